package api

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"math/big"
	"strings"

	"github.com/containerd/errdefs"
)

// A join token is SWMTKN-1-<digest of the root certificate>-<secret>, both in base 36 with leading zeros. The digest proves the cluster
// to the node before the node says anything; the secret proves the node to the cluster. Each role has its own secret.
const (
	tokenPrefix    = "SWMTKN-1-"
	tokenDigestLen = 50 // 36^50 > 2^256
	tokenSecretLen = 25 // 36^25 > 2^128
	tokenLen       = len(tokenPrefix) + tokenDigestLen + 1 + tokenSecretLen
)

// JoinToken is a parsed token. Its secret must never be logged or put into an error.
type JoinToken struct {
	CADigest [sha256.Size]byte
	secret   string
}

// NewJoinToken makes a token with a fresh secret for the cluster whose root certificate (DER) is given.
func NewJoinToken(rootDER []byte) JoinToken {
	var b [16]byte
	if _, err := rand.Read(b[:]); err != nil {
		panic(err) // the kernel's random source does not fail (getrandom(2))
	}
	return JoinToken{CADigest: sha256.Sum256(rootDER), secret: base36(b[:], tokenSecretLen)}
}

// ParseJoinToken reads a token; everything but the canonical form is refused.
func ParseJoinToken(s string) (JoinToken, error) {
	bad := func(why string) (JoinToken, error) {
		return JoinToken{}, Errorf(errdefs.ErrInvalidArgument, "invalid join token: %s; copy the whole token that \"docker swarm join-token worker\" (or manager) prints on a manager", why)
	}
	if len(s) != tokenLen {
		return bad("it is not " + tokenLenText + " characters long")
	}
	rest, ok := strings.CutPrefix(s, tokenPrefix)
	if !ok {
		return bad("it does not start with " + tokenPrefix)
	}
	digest, secret := rest[:tokenDigestLen], rest[tokenDigestLen+1:]
	if rest[tokenDigestLen] != '-' || !isBase36(digest) || !isBase36(secret) {
		return bad("it has characters that no token has")
	}
	n, _ := new(big.Int).SetString(digest, 36)
	if n.BitLen() > 8*sha256.Size {
		return bad("its digest is out of range")
	}
	t := JoinToken{secret: secret}
	n.FillBytes(t.CADigest[:])
	return t, nil
}

// tokenLenText is tokenLen for the error text.
const tokenLenText = "85"

// String is the token as users pass it on.
func (t JoinToken) String() string {
	return tokenPrefix + base36(t.CADigest[:], tokenDigestLen) + "-" + t.secret
}

// Matches compares two tokens in constant time.
func (t JoinToken) Matches(other string) bool {
	return t.secret != "" && subtle.ConstantTimeCompare([]byte(t.String()), []byte(other)) == 1
}

// MatchesRoot reports whether the token is for the cluster with this root certificate (DER).
func (t JoinToken) MatchesRoot(rootDER []byte) bool {
	d := sha256.Sum256(rootDER)
	return subtle.ConstantTimeCompare(t.CADigest[:], d[:]) == 1
}

func base36(b []byte, width int) string {
	s := new(big.Int).SetBytes(b).Text(36)
	return strings.Repeat("0", width-len(s)) + s
}

func isBase36(s string) bool {
	for i := range len(s) {
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'z') {
			return false
		}
	}
	return true
}
