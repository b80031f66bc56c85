package engine

import (
	"io"
	"strings"
	"testing"
	"testing/iotest"
)

func TestDetachKeys(t *testing.T) {
	for _, tc := range []struct{ keys, in, want string }{
		{"", "abc\x10\x11def", "abc"},
		{"", "a\x10b\x10\x10\x11x", "a\x10b\x10"},
		{"", "no keys\x10", "no keys"},
		{"ctrl-a,b", "x\x01ay\x01bz", "x\x01ay"},
		{"q", "abcq", "abc"},
		{"a,a,b", "xaaab!", "xa"},
		{"ctrl-@,ctrl-_", "x\x00\x1fy", "x"},
	} {
		for _, slow := range []bool{false, true} {
			var in io.Reader = strings.NewReader(tc.in)
			if slow {
				in = iotest.OneByteReader(in)
			}
			k, err := parseKeys(tc.keys)
			if err != nil {
				t.Fatal(err)
			}
			over := make(chan struct{})
			found := false
			r := &keyReader{in: in, keys: k, over: over}
			r.detach = func() { found = true; close(over) }
			got, err := io.ReadAll(r)
			if err != nil || string(got) != tc.want || found != (tc.in != "no keys\x10") {
				t.Errorf("keys %q, input %q, slow %v: %q, found %v, %v, want %q", tc.keys, tc.in, slow, got, found, err, tc.want)
			}
		}
	}
	for _, bad := range []string{"ctrl-", "ctrl-1", "ab", ",", "ctrl-a,", strings.Repeat("a,", 20) + "a"} {
		if _, err := parseKeys(bad); err == nil {
			t.Errorf("keys %q were taken", bad)
		}
	}
}
