package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"sync"
	"time"

	"skein/manager/api"
)

const (
	applyRetryMin = time.Second
	applyRetryMax = 30 * time.Second
)

// applier makes the network agree with the newest tables: one goroutine, versions that came while it worked are skipped.
type applier struct {
	network Network
	current func() (Tables, bool)
	log     *slog.Logger
	wake    chan struct{}
	acked   chan struct{} // poked when acks changed

	mu      sync.Mutex
	applied map[string]uint64
	failed  map[string]string
	unsent  map[string]bool // tables whose ack is to be sent
	last    Tables          // given to the network last
	changed chan struct{}   // closed and made anew at each application
}

func newApplier(n Network, current func() (Tables, bool), log *slog.Logger) *applier {
	return &applier{
		network: n, current: current, log: log, wake: make(chan struct{}, 1), acked: make(chan struct{}, 1),
		applied: map[string]uint64{}, failed: map[string]string{}, unsent: map[string]bool{}, changed: make(chan struct{}),
	}
}

func (p *applier) poke() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

func (p *applier) run(ctx context.Context) error {
	retry := time.NewTimer(time.Hour)
	defer retry.Stop()
	delay := applyRetryMin
	for {
		retry.Stop()
		if tables, ok := p.current(); ok {
			errs := p.network.SetTables(ctx, tables)
			if ctx.Err() != nil {
				return ctx.Err()
			}
			p.note(tables, errs)
			if len(errs) == 0 {
				delay = applyRetryMin
			} else {
				retry.Reset(delay)
				delay = min(2*delay, applyRetryMax)
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-p.wake:
		case <-retry.C:
		}
	}
}

// note records the outcome and prepares the acks of what changed.
func (p *applier) note(t Tables, errs map[string]error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.last = t
	close(p.changed)
	p.changed = make(chan struct{})
	outcome := func(id string, version uint64) {
		before, known := p.applied[id]
		failedBefore := p.failed[id]
		if err := errs[id]; err != nil {
			if failedBefore != err.Error() {
				p.log.Error("apply table", "table", id, "version", version, "err", err)
			}
			p.failed[id] = err.Error()
		} else {
			p.applied[id] = version
			delete(p.failed, id)
		}
		if !known || before != p.applied[id] || failedBefore != p.failed[id] {
			p.unsent[id] = true
		}
	}
	outcome(api.MeshTable, t.Mesh.Version)
	for id, tab := range t.Networks {
		outcome(id, tab.Version)
	}
	gone := func(id string) bool { _, ok := t.Networks[id]; return !ok && id != api.MeshTable }
	maps.DeleteFunc(p.applied, func(id string, _ uint64) bool { return gone(id) })
	maps.DeleteFunc(p.failed, func(id string, _ string) bool { return gone(id) })
	maps.DeleteFunc(p.unsent, func(id string, _ bool) bool { return gone(id) })
	if len(p.unsent) > 0 {
		select {
		case p.acked <- struct{}{}:
		default:
		}
	}
}

// await waits until a task's endpoint is in the applied tables; at the end of ctx it tells what is missing.
func (p *applier) await(ctx context.Context, a *api.Assignment) error {
	for {
		p.mu.Lock()
		missing, changed := p.missingLocked(a), p.changed
		p.mu.Unlock()
		if missing == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return missing
		case <-changed:
		}
	}
}

func (p *applier) missingLocked(a *api.Assignment) error {
	for _, at := range a.Attachments {
		t, known := p.last.Networks[at.NetworkId]
		switch {
		case !known:
			return fmt.Errorf("the managers sent no table of network %s", at.NetworkId)
		case p.failed[at.NetworkId] != "":
			return fmt.Errorf("network %s: %s", t.Network.GetName(), p.failed[at.NetworkId])
		case t.Endpoints[a.TaskId] == nil:
			return fmt.Errorf("network %s: the managers' table lacks this task", t.Network.GetName())
		}
	}
	if a.Gateway4 == "" && a.Gateway6 == "" {
		return nil
	}
	if _, ok := p.applied[api.MeshTable]; !ok {
		return errors.New("the routing mesh is not set up")
	}
	return nil
}

// acks returns what was applied: everything, or what was not returned before.
func (p *applier) acks(all bool) []*api.TableAck {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []*api.TableAck
	for id, v := range p.applied {
		if all || p.unsent[id] {
			out = append(out, &api.TableAck{Table: id, Version: v, Err: p.failed[id]})
			delete(p.unsent, id)
		}
	}
	for id, err := range p.failed {
		if _, ok := p.applied[id]; !ok && (all || p.unsent[id]) {
			out = append(out, &api.TableAck{Table: id, Err: err})
			delete(p.unsent, id)
		}
	}
	return out
}

func (p *applier) state() (map[string]uint64, map[string]string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return maps.Clone(p.applied), maps.Clone(p.failed)
}
