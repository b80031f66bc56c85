package daemon

import (
	"context"

	"skein/agent/liveness"
	"skein/manager/api"
)

// noteCredentials takes the managers' word on whom to trust and what to encrypt gossip with. Only the newest word counts.
func (n *clusterNode) noteCredentials(c *api.Credentials) {
	if c.Renew {
		n.id.RenewSoon()
	}
	for {
		select {
		case n.creds <- c:
			return
		default:
		}
		select {
		case <-n.creds:
		default:
		}
	}
}

// keepCredentials writes down and uses what the managers say.
func (n *clusterNode) keepCredentials(ctx context.Context, live *liveness.Liveness) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case c := <-n.creds:
			n.useCredentials(c, live)
		}
	}
}

func (n *clusterNode) useCredentials(c *api.Credentials, live *liveness.Liveness) {
	if len(c.TrustPem) > 0 {
		changed, err := n.id.Trust(c.TrustPem)
		if err != nil {
			n.log.Warn("the cluster's root certificates", "err", err) // said again when there is a new certificate
		}
		if changed {
			n.log.Info("the cluster's root certificates have changed")
			n.agent.TLSChanged()
		}
	}
	if len(c.GossipKeys) == 0 {
		return
	}
	changed, err := n.id.SetGossipKeys(c.GossipKeys)
	if err == nil && changed {
		err = live.SetKeys(n.id.GossipKeys())
	}
	if err != nil {
		n.log.Warn("the cluster's gossip keys", "err", err)
	}
}
