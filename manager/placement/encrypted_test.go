package placement

import (
	"testing"

	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
	"skein/manager/store"
	"skein/scheduler"
)

type someNetworks struct {
	store.ReadTx
	all map[string]*store.Network
}

func (n someNetworks) Network(id string) *store.Network { return n.all[id] }

// Tasks of an encrypted network go to nodes with a key.
func TestEncrypting(t *testing.T) {
	view := someNetworks{all: map[string]*store.Network{"plain": {Id: "plain"}, "secret": {Id: "secret", Encrypted: true}}}
	spec := func(networks ...string) *swarm.ServiceSpec {
		s := &swarm.ServiceSpec{}
		for _, n := range networks {
			s.TaskTemplate.Networks = append(s.TaskTemplate.Networks, swarm.NetworkAttachmentConfig{Target: n})
		}
		return s
	}
	with := NodeOf(&store.Node{Id: "with", Crypt: &api.NodeCrypt{Keys: []*api.CryptKey{{PublicKey: make([]byte, 32)}}}})
	without := NodeOf(&store.Node{Id: "without", Crypt: &api.NodeCrypt{Err: "no TUN"}})
	for _, c := range []struct {
		networks []string
		with     bool
		without  bool
	}{{nil, true, true}, {[]string{"plain"}, true, true}, {[]string{"plain", "secret"}, true, false}} {
		req := encrypting(view, spec(c.networks...), &scheduler.Requirements{})
		if got := req.MatchesAll(&with); got != c.with {
			t.Errorf("networks %v: a node with a key matches: %v", c.networks, got)
		}
		if got := req.MatchesAll(&without); got != c.without {
			t.Errorf("networks %v: a node without a key matches: %v", c.networks, got)
		}
	}
}
