// Package liveness tells quickly that a node seems dead.
//
// All nodes of a cluster watch each other with memberlist (SWIM): packets over UDP, encrypted with the cluster's gossip key, streams over
// the node-to-node listener with mutual TLS. Its one output is a hint, OnDead(nodeID): a manager probes that node then and decides by the
// probe and the lease (DECISIONS 12). Hints may be wrong, late or missing. It must not change any table, and carries no state of the
// cluster. Used by cmd/daemon; a cluster works without it, only slower to notice a death.
package liveness

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/memberlist"
)

const (
	// A wrong suspicion costs a manager one ping, a late one costs users time: so faster than memberlist's LAN defaults.
	probeInterval   = 500 * time.Millisecond
	probeTimeout    = 250 * time.Millisecond
	suspicionMult   = 2 // suspected → dead after about one second
	gossipInterval  = 100 * time.Millisecond
	awarenessMax    = 4
	reclaimAfter    = time.Second      // a node that comes back with another address is believed
	rejoinEvery     = 10 * time.Second // managers that are not members are asked: heals partitions
	rejoinFirst     = time.Second      // while this node is alone
	maxJoinPerRound = 5
)

// Config of a Liveness.
type Config struct {
	NodeID string
	// Advertise is the address at which others reach Packets and Streams.
	Advertise netip.AddrPort
	// Packets is a UDP socket, Streams the gossip part of the node-to-node listener. Run closes both.
	Packets net.PacketConn
	Streams net.Listener
	// Dial opens a stream to another node's listener.
	Dial func(ctx context.Context, addr string) (net.Conn, error)
	// Keys encrypt packets: the cluster's gossip keys, 32 bytes each; the first is used, all are accepted.
	Keys [][]byte
	// Peers returns addresses to join: the managers'.
	Peers func() []string
	// OnDead is told of a node that seems dead. It must not block.
	OnDead func(nodeID string)
	Log    *slog.Logger
}

func (c *Config) validate() error {
	switch {
	case c.NodeID == "" || !c.Advertise.IsValid():
		return errors.New("liveness: node id and advertised address are needed")
	case len(c.Keys) == 0:
		return errors.New("liveness: no gossip key")
	case c.Packets == nil || c.Streams == nil || c.Dial == nil || c.Peers == nil || c.OnDead == nil:
		return errors.New("liveness: Packets, Streams, Dial, Peers and OnDead are needed")
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return nil
}

// Liveness is this node's part in the watching.
type Liveness struct {
	cfg  Config
	keys *memberlist.Keyring
}

// New checks the configuration. It starts nothing.
func New(cfg Config) (*Liveness, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	for _, k := range cfg.Keys {
		if len(k) != keyBytes {
			return nil, fmt.Errorf("liveness: gossip key has %d bytes, want %d", len(k), keyBytes)
		}
	}
	ring, err := memberlist.NewKeyring(cfg.Keys, cfg.Keys[0])
	if err != nil {
		return nil, fmt.Errorf("liveness: gossip keys: %w", err)
	}
	return &Liveness{cfg: cfg, keys: ring}, nil
}

const keyBytes = 32

// SetKeys replaces the keys; packets on their way under a key that goes are lost, which gossip is made for.
func (l *Liveness) SetKeys(keys [][]byte) error {
	if len(keys) == 0 {
		return errors.New("liveness: no gossip key")
	}
	for _, k := range keys {
		if len(k) != keyBytes {
			return fmt.Errorf("liveness: gossip key has %d bytes, want %d", len(k), keyBytes)
		}
		if err := l.keys.AddKey(k); err != nil {
			return fmt.Errorf("liveness: add gossip key: %w", err)
		}
	}
	if err := l.keys.UseKey(keys[0]); err != nil {
		return fmt.Errorf("liveness: use gossip key: %w", err)
	}
	for _, old := range l.keys.GetKeys() {
		if !slices.ContainsFunc(keys, func(k []byte) bool { return bytes.Equal(k, old) }) {
			if err := l.keys.RemoveKey(old); err != nil {
				return fmt.Errorf("liveness: remove gossip key: %w", err)
			}
		}
	}
	return nil
}

// Run takes part until ctx ends. It does not say goodbye then: the daemon may only be restarting.
func (l *Liveness) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	t := newTransport(ctx, l.cfg)
	defer t.stop()
	list, err := memberlist.Create(l.config(t))
	if err != nil {
		cancel() // before stop waits
		return fmt.Errorf("liveness: %w", err)
	}
	l.keepJoined(ctx, list)
	cancel()
	if err := list.Shutdown(); err != nil {
		return fmt.Errorf("liveness: shut down: %w", err)
	}
	return ctx.Err()
}

func (l *Liveness) config(t *transport) *memberlist.Config {
	c := memberlist.DefaultLANConfig()
	c.Name, c.Transport, c.Keyring = l.cfg.NodeID, t, l.keys
	c.AdvertiseAddr, c.AdvertisePort = l.cfg.Advertise.Addr().String(), int(l.cfg.Advertise.Port())
	c.ProbeInterval, c.ProbeTimeout = probeInterval, probeTimeout
	c.SuspicionMult, c.GossipInterval, c.AwarenessMaxMultiplier = suspicionMult, gossipInterval, awarenessMax
	c.DeadNodeReclaimTime = reclaimAfter
	c.Events = events{l.cfg}
	c.LogOutput = logLines{l.cfg.Log}
	return c
}

// keepJoined joins the managers that are not members.
func (l *Liveness) keepJoined(ctx context.Context, list *memberlist.Memberlist) {
	for {
		missing := l.missing(list)
		if len(missing) > 0 {
			if _, err := list.Join(missing); err != nil && ctx.Err() == nil {
				l.cfg.Log.Debug("join gossip", "peers", missing, "err", err)
			}
		}
		wait := rejoinEvery
		if list.NumMembers() < 2 {
			wait = rejoinFirst
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		}
	}
}

func (l *Liveness) missing(list *memberlist.Memberlist) []string {
	known := map[string]bool{l.cfg.Advertise.String(): true}
	for _, m := range list.Members() {
		known[m.Address()] = true
	}
	var out []string
	for _, p := range l.cfg.Peers() {
		if !known[p] && len(out) < maxJoinPerRound {
			out = append(out, p)
		}
	}
	return out
}

// events passes deaths on. A node that left on its own accord is no death; nobody here does.
type events struct{ cfg Config }

func (e events) NotifyJoin(*memberlist.Node)   {}
func (e events) NotifyUpdate(*memberlist.Node) {}
func (e events) NotifyLeave(n *memberlist.Node) {
	if n.Name != e.cfg.NodeID {
		e.cfg.OnDead(n.Name)
	}
}

// logLines passes memberlist's log on, at debug level: its warnings are about hints.
type logLines struct{ log *slog.Logger }

func (w logLines) Write(p []byte) (int, error) {
	w.log.Debug(strings.TrimSpace(string(p)))
	return len(p), nil
}
