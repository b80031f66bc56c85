package overlay

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"skein/overlay/link"
)

// Deleting a container's devices and its namespace takes the kernel 10 to 20 ms of grace periods, whoever waits for it. So a removed
// sandbox only departs: its names, rules and ports are gone when RemoveSandbox returns, its devices and namespace a moment later, all
// that wait at that time in one go. Whoever wants its id or one of its addresses again waits for that.

// departingGroup marks devices that are about to be deleted together.
const departingGroup = 0x5ce1d

// departure is a sandbox on its way out.
type departure struct {
	id   string
	legs []outerLeg
	keys []legKey
}

// outerLeg is a device in the namespace of its connection.
type outerLeg struct {
	conn *link.Conn
	name string
}

// legKey is an address on a network or bridge, the mesh's without a name.
type legKey struct {
	network string
	addr    netip.Addr
}

func legKeys(s Sandbox) []legKey {
	var out []legKey
	for _, l := range s.Legs {
		out = append(out, legKey{l.NetworkID, l.Addr4.Addr()})
	}
	for _, b := range s.Bridges {
		out = append(out, b.keys()...)
	}
	if s.Gateway4.IsValid() {
		out = append(out, legKey{"", s.Gateway4})
	}
	return out
}

// departures are all sandboxes on their way out; one goroutine at a time deletes them, as long as there are new ones.
type departures struct {
	mu      sync.Mutex
	pending map[string]*departure
	again   bool          // something came since the running attempt began
	round   chan struct{} // closed at the end of the running attempt, nil when none runs
	err     error         // of the last attempt
	work    sync.WaitGroup
}

// depart takes over what is left of a removed sandbox.
func (d *Driver) depart(p *departure) {
	q := &d.departing
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.pending == nil {
		q.pending = map[string]*departure{}
	}
	q.pending[p.id] = p
	d.startDepartures()
}

// startDepartures makes an attempt at all that wait. The caller holds departing.mu.
func (d *Driver) startDepartures() {
	q := &d.departing
	if q.round != nil {
		q.again = true
		return
	}
	q.round = make(chan struct{})
	q.work.Go(d.attemptDepartures) // ends with the attempt; Close waits
}

// attemptDepartures deletes what waits until nothing new has come.
func (d *Driver) attemptDepartures() {
	q := &d.departing
	for {
		q.mu.Lock()
		batch := make([]*departure, 0, len(q.pending))
		for _, p := range q.pending {
			batch = append(batch, p)
		}
		q.again = false
		q.mu.Unlock()
		gone, err := d.finish(batch)
		if len(gone) > 0 {
			_ = d.step(func() error { d.removeRouters(false); return nil }) // a network may have waited for its last leg
		}
		if err != nil {
			d.log.Warn("the network of a removed container is not deleted yet", "error", err)
		}
		q.mu.Lock()
		for _, p := range gone {
			if q.pending[p.id] == p {
				delete(q.pending, p.id)
			}
		}
		q.err = err
		close(q.round)
		q.round = nil
		if !q.again {
			q.mu.Unlock()
			return
		}
		q.round = make(chan struct{})
		q.mu.Unlock()
	}
}

// finish deletes devices and namespaces and returns those that are gone.
func (d *Driver) finish(batch []*departure) (gone []*departure, err error) {
	names := map[*link.Conn][]string{}
	for _, p := range batch {
		for _, l := range p.legs {
			names[l.conn] = append(names[l.conn], l.name)
		}
	}
	failed := map[*link.Conn]error{}
	for conn, list := range names {
		if e := conn.DelLinks(list, departingGroup); e != nil && !errors.Is(e, unix.EBADF) { // closed: its namespace is gone with all devices
			failed[conn] = e
		}
	}
	for _, p := range batch {
		e := link.RemoveNS(d.sandboxFile(p.id))
		for _, l := range p.legs {
			e = errors.Join(e, failed[l.conn])
		}
		if e != nil {
			err = errors.Join(err, fmt.Errorf("container %s: %w", p.id, e))
			continue
		}
		gone = append(gone, p)
	}
	return gone, err
}

// awaitDeparted waits until nothing of the wanted is on its way out. A sandbox that cannot be deleted is an error.
func (d *Driver) awaitDeparted(ctx context.Context, want func(*departure) bool) error {
	q := &d.departing
	for tried := false; ; tried = true {
		q.mu.Lock()
		waits := false
		for _, p := range q.pending {
			waits = waits || want(p)
		}
		if !waits {
			q.mu.Unlock()
			return nil
		}
		if tried && q.round == nil {
			err := q.err
			q.mu.Unlock()
			return fmt.Errorf("what a removed container left is still there: %w", err)
		}
		d.startDepartures()
		round := q.round
		q.mu.Unlock()
		select {
		case <-round:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// awaitRoom waits until nothing that departs has the sandbox's id or one of its addresses.
func (d *Driver) awaitRoom(ctx context.Context, s Sandbox) error {
	keys := legKeys(s)
	return d.awaitDeparted(ctx, func(p *departure) bool {
		return p.id == s.ID || slices.ContainsFunc(p.keys, func(k legKey) bool { return slices.Contains(keys, k) })
	})
}

// awaitAllDeparted waits for all of them.
func (d *Driver) awaitAllDeparted(ctx context.Context) error {
	return d.awaitDeparted(ctx, func(*departure) bool { return true })
}

// departs tells whether a sandbox is on its way out.
func (d *Driver) departs(id string) bool {
	d.departing.mu.Lock()
	defer d.departing.mu.Unlock()
	return d.departing.pending[id] != nil
}
