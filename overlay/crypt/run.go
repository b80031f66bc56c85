package crypt

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"
)

const (
	settleEvery = 250 * time.Millisecond // while sessions are missing
	idleEvery   = 30 * time.Second
	firstRetry  = time.Second
	maxTries    = 8 // later WireGuard tries by itself whenever there is something to send
	// overlapFor is how long a replaced key is still good for what others send: they follow within settleEvery.
	overlapFor = 30 * time.Second
	// overlapMax ends waiting for nodes that take no part in the change of a key.
	overlapMax = time.Hour
)

// Run begins missing sessions anew and replaces keys until ctx is done.
func (t *Tunnel) Run(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		case <-t.wake:
		}
		next, changed, err := t.settle(ctx, time.Now())
		if err != nil {
			t.log.Error("encrypted networks", "error", err)
		}
		if changed && t.opts.KeysChanged != nil {
			t.opts.KeysChanged()
		}
		timer.Reset(next)
	}
}

// settle looks at all sessions once. It tells when to look again, and whether this node's keys changed.
func (t *Tunnel) settle(ctx context.Context, now time.Time) (next time.Duration, changed bool, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return idleEvery, false, nil
	}
	next = idleEvery
	for _, s := range t.sides {
		if s == nil {
			continue
		}
		err = errors.Join(err, s.look(), s.retry(now))
		if !s.settled() {
			next = settleEvery
		}
	}
	t.setRoutes()
	changed, e := t.rotate(ctx, now)
	next = min(next, t.opts.RotateEvery)
	if len(t.keys) > 1 {
		next = settleEvery
	}
	return next, changed, errors.Join(err, e)
}

// settled tells that there is nobody left whom a session is to be begun with.
func (s *side) settled() bool {
	for _, p := range s.peers {
		if !p.up && p.tries < maxTries {
			return false
		}
	}
	return true
}

// retry begins sessions that are due. The node with the lower index begins first; random pauses keep two that try at once apart.
func (s *side) retry(now time.Time) error {
	var err error
	for key, p := range s.peers {
		if p.up || p.tries >= maxTries {
			continue
		}
		wait := firstRetry << min(p.tries, 4)
		if p.tries == 0 && s.self > p.node {
			wait = settleEvery
		}
		if now.Sub(p.since) < wait {
			continue
		}
		if p.tries == 0 && s.self > p.node {
			s.greet(key)
		} else {
			err = errors.Join(err, s.again(key, p))
		}
		p.tries++
		p.since = now.Add(rand.N(settleEvery))
	}
	return err
}

// rotate replaces the key when its time has come and it is in use: a successor is made and told to all, works beside it, takes over when every node has a
// session with it, and after a while the old one is dropped. The caller holds mu.
func (t *Tunnel) rotate(ctx context.Context, now time.Time) (changed bool, err error) {
	if len(t.keys) == 0 {
		return false, nil
	}
	newest := t.keys[len(t.keys)-1]
	switch {
	case len(t.keys) == 1 && t.have && now.Sub(newest.Created) >= t.opts.RotateEvery:
		return true, t.addKey(ctx, 1-newest.Slot, now)
	case len(t.keys) == 1:
		return false, nil
	case t.switched.IsZero():
		if s := t.sides[newest.Slot]; s == nil || s.complete() || now.Sub(newest.Created) > overlapMax {
			t.switched = now
			if s != nil {
				t.setSender(s)
				t.setRoutes()
			}
		}
		return false, nil
	case now.Sub(t.switched) < t.opts.Overlap && t.have:
		return false, nil
	}
	return true, t.dropKey(ctx)
}

// complete tells that there is a session with every node.
func (s *side) complete() bool {
	nodes := map[uint32]bool{}
	for _, p := range s.peers {
		nodes[p.node] = nodes[p.node] || p.up
	}
	for _, up := range nodes {
		if !up {
			return false
		}
	}
	return true
}

func (t *Tunnel) addKey(ctx context.Context, slot uint8, now time.Time) error {
	k, err := newKey(slot, now)
	if err != nil {
		return err
	}
	before := t.keys
	t.keys, t.switched = append(slices.Clone(before), k), time.Time{}
	if err = t.storeKeys(ctx); err == nil && t.have {
		if err = t.startSide(ctx, k); err == nil {
			err = t.setPeers()
		}
	}
	if err != nil {
		t.keys = before
		return fmt.Errorf("replace the node's key: %w", errors.Join(err, t.storeKeys(ctx)))
	}
	t.log.Info("replacing the node's key of encrypted networks")
	return nil
}

// dropKey ends the older key.
func (t *Tunnel) dropKey(ctx context.Context) error {
	old := t.keys[0]
	t.keys, t.switched = slices.Clone(t.keys[1:]), time.Time{}
	if s := t.sides[old.Slot]; s != nil {
		t.sides[old.Slot] = nil
		s.close()
	}
	t.log.Info("replaced the node's key of encrypted networks")
	return errors.Join(t.storeKeys(ctx), t.release(ctx, udpName(old.Slot)))
}

// Missing are the nodes that there is no session with, and those that do not answer any more.
func (t *Tunnel) Missing() []uint32 {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.sender.Load()
	var out []uint32
	for _, n := range t.cfg.Nodes {
		if s == nil || !slices.ContainsFunc(n.Keys, func(k Key) bool { return !s.missing(k.Public) }) {
			out = append(out, n.Index)
		}
	}
	slices.Sort(out)
	return out
}
