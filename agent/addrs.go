package agent

import (
	"slices"
	"time"

	"skein/manager/api"
)

// addrsEvery is how often the node's addresses are looked at.
const addrsEvery = 10 * time.Second

// nodeAddrs are the node's addresses now; nil when nobody knows them. One goroutine at a time asks: that of the session.
func (a *Agent) nodeAddrs() *api.NodeAddrs {
	if a.cfg.Addrs == nil {
		return nil
	}
	list := a.cfg.Addrs()
	list = list[:min(len(list), api.MaxNodeAddrs)]
	a.addrs, a.addrsAt = list, time.Now()
	return &api.NodeAddrs{Addrs: list}
}

// changedAddrs returns them when they are others than those that the managers were told.
func (a *Agent) changedAddrs() *api.NodeAddrs {
	if a.cfg.Addrs == nil || time.Since(a.addrsAt) < addrsEvery {
		return nil
	}
	old := a.addrs
	now := a.nodeAddrs()
	if slices.Equal(old, now.Addrs) {
		return nil
	}
	return now
}
