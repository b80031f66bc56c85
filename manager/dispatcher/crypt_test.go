package dispatcher

import (
	"slices"
	"strings"
	"testing"

	"skein/manager/api"
	"skein/manager/store"
)

func TestValidCrypt(t *testing.T) {
	key := func(slot uint32, size int, port uint32) *api.CryptKey {
		return &api.CryptKey{Slot: slot, PublicKey: make([]byte, size), Port: port}
	}
	for _, c := range []struct {
		what *api.NodeCrypt
		want bool
	}{
		{nil, true}, {&api.NodeCrypt{Err: "no TUN"}, true},
		{&api.NodeCrypt{Keys: []*api.CryptKey{key(0, 32, 51840)}}, true},
		{&api.NodeCrypt{Keys: []*api.CryptKey{key(0, 32, 51840), key(1, 32, 51841)}}, true},
		{&api.NodeCrypt{Keys: []*api.CryptKey{key(1, 32, 51840), key(1, 32, 51841)}}, false},
		{&api.NodeCrypt{Keys: []*api.CryptKey{key(2, 32, 51840)}}, false},
		{&api.NodeCrypt{Keys: []*api.CryptKey{key(0, 31, 51840)}}, false},
		{&api.NodeCrypt{Keys: []*api.CryptKey{key(0, 32, 0)}}, false},
		{&api.NodeCrypt{Keys: []*api.CryptKey{key(0, 32, 1<<16)}}, false},
		{&api.NodeCrypt{Err: strings.Repeat("x", maxCryptErr+1)}, false},
	} {
		if got := validCrypt(c.what); got != c.want {
			t.Errorf("%v: %v", c.what, got)
		}
	}
}

// A node's keys are in its record and go to the others; what it says of missing sessions is named.
func TestKeysOfNodes(t *testing.T) {
	keys := &api.NodeCrypt{Keys: []*api.CryptKey{{PublicKey: make([]byte, 32), Port: 51840}}}
	rec := &store.Node{Id: "n1", Index: 1, Hostname: "one"}
	for _, c := range []struct {
		hello *api.Hello
		level uint32
		want  int
	}{
		{&api.Hello{Hostname: "one", Crypt: keys}, api.LevelNetworks, 1},
		{&api.Hello{Crypt: keys}, api.LevelNetworks, 1},
		{&api.Hello{Hostname: "one", Crypt: keys}, api.LevelNetworks - 1, 0},
		{&api.Hello{Hostname: "one"}, api.LevelNetworks, 0},
	} {
		got := -1
		for _, ch := range describe(rec, c.hello, c.level) {
			if n := ch.GetPutNode(); n != nil {
				got = len(n.Crypt.GetKeys())
			}
		}
		if got != c.want && !(got == -1 && c.want == 0) {
			t.Errorf("hello %v at level %d: %d keys, want %d", c.hello, c.level, got, c.want)
		}
	}
	d := &Dispatcher{spread: newSpread()}
	d.spread.nodes[2] = &api.NodeEndpoint{Index: 2, Hostname: "two", UnderlayAddr: "192.0.2.2", Keys: keys.Keys}
	d.spread.nodes[3] = &api.NodeEndpoint{Index: 3, Hostname: "three"}
	n := &node{rec: rec, facts: &api.NodeFacts{NoSession: []uint32{2, 3, 4}}}
	got := d.unencrypted(n)
	if len(got) != 2 || !strings.Contains(got[0], "node two") || !strings.Contains(got[0], "51840") || !slices.ContainsFunc(got, func(s string) bool { return strings.Contains(s, "three has no key") }) {
		t.Errorf("notes %q", got)
	}
}
