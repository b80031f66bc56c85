package api

import (
	"crypto/rand"
	"math/big"
	"strings"
	"testing"
)

// The compact form gives the texts that were given when IDs were made with big numbers.
func TestIDForms(t *testing.T) {
	slow := func(b []byte) string {
		s := new(big.Int).SetBytes(b).Text(36)
		s = strings.Repeat("0", max(0, 25-len(s))) + s
		return s[len(s)-25:]
	}
	var prev ID
	for i := range 20000 {
		b := make([]byte, 17)
		_, _ = rand.Read(b[min(i%19, 17):])
		id := idOf(b)
		if got, want := id.String(), slow(b); got != want {
			t.Fatalf("%x: got %s, want %s", b, got, want)
		}
		back, ok := ParseID(id.String())
		if !ok || back != id {
			t.Fatalf("%s reads as %v", id, back)
		}
		if c := strings.Compare(id.String(), prev.String()); c != id.Compare(prev) || (c < 0 && id.Rank() > prev.Rank()) || (c > 0 && id.Rank() < prev.Rank()) {
			t.Fatalf("%s and %s: order %d, ranks %x %x", id, prev, c, id.Rank(), prev.Rank())
		}
		prev = id
	}
	if got := TaskID("s1", 7, "", 3); got != "higac6jlxhsyxixgxza3tn3xg" {
		t.Errorf("got %s, want %s", got, "higac6jlxhsyxixgxza3tn3xg")
	}
	low, _ := ParseID(strings.Repeat("0", 25))
	high, _ := ParseID(strings.Repeat("z", 25))
	if low.Rank() != 0 || high.Rank() < 1<<63 {
		t.Errorf("ranks %x..%x", low.Rank(), high.Rank())
	}
	for _, bad := range []string{"", "abc", strings.Repeat("A", 25), strings.Repeat("a", 26), strings.Repeat("a", 24) + "-"} {
		if _, ok := ParseID(bad); ok {
			t.Errorf("%q was read", bad)
		}
	}
}
