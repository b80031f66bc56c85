package api

import (
	"errors"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestJoinToken(t *testing.T) {
	root, other := []byte("root certificate"), []byte("another")
	tok := NewJoinToken(root)
	s := tok.String()
	if len(s) != tokenLen || tokenLenText != "85" || tokenLen != 85 {
		t.Fatalf("token %q has %d characters, want %d", s, len(s), tokenLen)
	}
	back, err := ParseJoinToken(s)
	if err != nil || back != tok {
		t.Fatalf("parse %q = %+v, %v; want the same token", s, back, err)
	}
	if !back.MatchesRoot(root) || back.MatchesRoot(other) {
		t.Error("token does not tell its root from another")
	}
	if again := NewJoinToken(root); again.Matches(s) || !tok.Matches(s) || (JoinToken{}).Matches((JoinToken{}).String()) {
		t.Error("a token must match itself, no token with another secret, and never the empty secret")
	}
	for _, bad := range []string{
		"", "x", s[:84], s + "0", strings.ToUpper(s), " " + s[1:], strings.Replace(s, "-1-", "-2-", 1), s[:60] + "é" + s[62:],
		tokenPrefix + strings.Repeat("z", 50) + "-" + strings.Repeat("0", 25), strings.Repeat("-", 85),
	} {
		_, err := ParseJoinToken(bad)
		if !errdefs.IsInvalidArgument(err) || strings.Contains(err.Error(), tok.secret) {
			t.Errorf("parse %q: %v; want an invalid-argument error without the secret", bad, err)
		}
	}
}

func FuzzParseJoinToken(f *testing.F) {
	f.Add(NewJoinToken([]byte("r")).String())
	f.Add("SWMTKN-1-")
	f.Fuzz(func(t *testing.T, s string) {
		tok, err := ParseJoinToken(s)
		if err == nil && tok.String() != s {
			t.Errorf("%q was accepted but is written %q", s, tok)
		}
	})
}

func TestErrorsKeepKindAndText(t *testing.T) {
	for _, kind := range []error{errdefs.ErrNotFound, errdefs.ErrConflict, errdefs.ErrInvalidArgument, errdefs.ErrUnavailable, errdefs.ErrAlreadyExists,
		errdefs.ErrPermissionDenied, errdefs.ErrUnauthenticated, errdefs.ErrFailedPrecondition, errdefs.ErrNotImplemented, errdefs.ErrResourceExhausted} {
		err := FromGRPC(ToGRPC(Errorf(kind, "service web not found")))
		if !errors.Is(err, kind) || err.Error() != "service web not found" {
			t.Errorf("%v crossed the wire as %v (%T)", kind, err, err)
		}
	}
	if FromGRPC(nil) != nil || ToGRPC(nil) != nil {
		t.Error("nil must stay nil")
	}
}
