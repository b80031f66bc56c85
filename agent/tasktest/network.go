package tasktest

import (
	"context"
	"maps"
	"sync"
	"time"

	"skein/agent"
)

// Network is a fake kernel: it remembers the tables it was given.
type Network struct {
	mu      sync.Mutex
	last    agent.Tables
	calls   int
	refuse  map[string]error
	delay   time.Duration
	changed func(agent.Tables)
}

// NewNetwork returns a network that applies everything at once.
func NewNetwork() *Network { return &Network{refuse: map[string]error{}} }

// SetTables implements agent.Network.
func (n *Network) SetTables(ctx context.Context, t agent.Tables) map[string]error {
	n.mu.Lock()
	delay := n.delay
	n.mu.Unlock()
	if wait(ctx, delay) != nil {
		return nil
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.last, n.calls = t, n.calls+1
	if n.changed != nil {
		n.changed(t)
	}
	return maps.Clone(n.refuse)
}

// Refuse makes applying a table fail with err; nil ends that.
func (n *Network) Refuse(table string, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.refuse, table)
	if err != nil {
		n.refuse[table] = err
	}
}

// SetDelay makes every application take that long.
func (n *Network) SetDelay(d time.Duration) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.delay = d
}

// OnChange has f called with each set of tables.
func (n *Network) OnChange(f func(agent.Tables)) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.changed = f
}

// Last returns the tables given last, and how often there were any.
func (n *Network) Last() (agent.Tables, int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.last, n.calls
}
