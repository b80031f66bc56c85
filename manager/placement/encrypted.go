package placement

import (
	"github.com/moby/moby/api/types/swarm"

	"skein/manager/store"
	"skein/scheduler"
)

// Nodes that can encrypt networks are told apart as if that was a plugin of theirs.
const (
	encryptionType = "Encryption"
	wireguard      = "wireguard"
)

func encryption(n *store.Node) scheduler.Plugin {
	if len(n.Crypt.GetKeys()) > 0 {
		return scheduler.Plugin{Type: encryptionType, Name: wireguard}
	}
	return scheduler.Plugin{Type: encryptionType, Name: "none"}
}

// encrypting adds what a revision's networks ask of a node.
func encrypting(view store.ReadTx, spec *swarm.ServiceSpec, req *scheduler.Requirements) *scheduler.Requirements {
	for _, n := range spec.TaskTemplate.Networks {
		if rec := view.Network(n.Target); rec != nil && rec.Encrypted {
			r := *req
			r.Plugins = append(r.Plugins[:len(r.Plugins):len(r.Plugins)], scheduler.Plugin{Type: encryptionType, Name: wireguard})
			return &r
		}
	}
	return req
}
