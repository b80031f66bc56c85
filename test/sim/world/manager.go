package world

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
	"skein/manager/control"
	"skein/manager/loop"
	"skein/manager/placement"
	"skein/manager/store"
)

// term is what a leader runs.
type term struct {
	m       *manager
	number  int
	drivers []*driver
	disp    *dispatcher
	control *control.Server
	running *driver // whose round is on
}

// driver is one controller's loop.
type driver struct {
	*loop.Driver
	t       *term
	name    string
	watcher *store.Watcher
	due     bool // a round is on its way
	wake    uint64
}

// elect makes a manager the leader if a majority of the group can agree on one.
func (w *World) elect() {
	if w.leader != nil {
		return
	}
	var able, members []*manager
	for _, m := range w.managers {
		if m.member {
			members = append(members, m)
			if m.up && !m.cut {
				able = append(able, m)
			}
		}
	}
	if len(able) <= len(members)/2 {
		return
	}
	m := pick(w, able)
	if m.term != nil {
		m.term.end() // of an earlier term of its own, which it did not know was over
	}
	m.catchUp(len(w.log.entries))
	w.leader = m
	w.terms++
	w.check.Term(w.time())
	m.begin()
	w.note("%s leads, term %d", m.name, w.terms)
}

// depose takes the leadership from a manager. It may not notice at once.
func (w *World) depose(m *manager) {
	if w.leader == m {
		w.leader = nil
		w.after(w.between(800*time.Millisecond, 3*time.Second), w.elect)
	}
	t := m.term
	if t == nil {
		return
	}
	w.after(w.between(0, 400*time.Millisecond), func() {
		if m.term == t {
			t.end()
		}
	})
}

// begin starts a term.
func (m *manager) begin() {
	w := m.w
	t := &term{m: m, number: w.terms}
	m.term = t
	for _, c := range w.controllers() {
		d := &driver{Driver: loop.NewDriver(m.store, c), t: t, name: c.Name(), watcher: m.store.Watch(c.Kinds()...)}
		t.drivers = append(t.drivers, d)
		d.schedule(w.between(0, 5*time.Millisecond))
	}
	t.control = control.New(control.Config{Store: renaming{m.store, w}, Managers: group{w, m}, Now: m.clock, Logger: slog.New(slog.DiscardHandler),
		Checks: []func(*swarm.ServiceSpec) error{func(s *swarm.ServiceSpec) error { _, err := placement.RequirementsOf(s); return err }}})
	t.disp = newDispatcher(t)
	t.disp.begin()
}

// end stops a term.
func (t *term) end() {
	if t.m.term != t {
		return
	}
	t.m.term = nil
	for _, d := range t.drivers {
		d.watcher.Close()
	}
	t.disp.end()
}

// poll schedules what has something to look at.
func (t *term) poll() {
	for _, d := range t.drivers {
		select {
		case <-d.watcher.C():
			d.schedule(t.m.w.between(0, 3*time.Millisecond))
		default:
		}
	}
	t.disp.poll()
}

// schedule has a round come, once.
func (d *driver) schedule(in time.Duration) {
	if d.due {
		return
	}
	d.due = true
	d.t.m.w.after(in, func() {
		if d.due {
			d.due = false
			d.round()
		}
	})
}

// round is one look of a controller.
func (d *driver) round() {
	m, t := d.t.m, d.t
	if m.term != t || !m.up || t.running == d {
		return
	}
	before := t.running
	t.running = d
	defer func() { t.running = before }()
	d.Mark(d.watcher.Take())
	wake, err := d.Round(context.Background(), m.clock())
	if err != nil {
		m.w.note("%s: %s: %v", m.name, d.name, err)
	}
	d.wake++
	if wake.IsZero() || m.term != t {
		return
	}
	serial := d.wake
	m.w.after(wake.Sub(m.clock()), func() {
		if d.wake == serial {
			d.round()
		}
	})
}

// interlope has others of the same leader propose while an entry is on its way.
func (t *term) interlope() {
	w := t.m.w
	switch x := w.r.IntN(4); {
	case x == 0 && w.users != nil:
		w.users.act()
	case x == 1:
		t.disp.write()
	default:
		if d := pick(w, t.drivers); d != t.running {
			d.round()
		}
	}
}

// crash ends a manager's process; it comes back with what its disk has.
func (w *World) crash(m *manager, away time.Duration) {
	if !m.up {
		return
	}
	w.note("%s crashes", m.name)
	if t := m.term; t != nil {
		t.end()
	}
	m.up = false
	m.life++
	m.lag = false
	if w.leader == m {
		w.leader = nil
		w.after(w.between(800*time.Millisecond, 3*time.Second), w.elect)
	}
	w.after(away, func() {
		if m.member {
			w.boot(m)
		}
	})
}

// boot starts a manager's process again, from a snapshot somewhere on the way and the log behind it.
func (w *World) boot(m *manager) {
	if m.up {
		return
	}
	index := m.applied
	m.up = true
	switch {
	case w.r.IntN(3) > 0: // its own state at its end is what its snapshot has
		m.restore(m.store, index)
	case w.r.IntN(2) == 0: // from the beginning
		m.reset(store.New(m), 0)
		m.catchUp(index)
	default: // it lost its disk or was away for too long: the newest state of all
		m.restore(w.log.observer, len(w.log.entries))
	}
	w.note("%s is back at entry %d", m.name, m.applied)
	m.follow()
	w.elect()
}

// isolate cuts a manager off from the others; the leader goes on as if nothing had happened, for its lease.
func (w *World) isolate(m *manager, d time.Duration) {
	if m.cut || !m.up {
		return
	}
	w.note("%s is cut off from the other managers", m.name)
	m.cut = true
	if w.leader == m {
		w.depose(m)
	}
	w.after(d, func() {
		m.cut = false
		w.note("%s is back among the managers", m.name)
		m.follow()
		w.elect()
	})
}

// keepGroup makes the group of managers follow the roles in the log.
func (w *World) keepGroup() {
	if w.leader == nil {
		return
	}
	roles := map[string]string{}
	w.state(func(tx store.ReadTx) {
		for _, n := range tx.Nodes() {
			roles[n.Id] = n.Role
		}
	})
	for _, m := range slices.Clone(w.managers) {
		role := roles[m.name]
		switch {
		case m.member && role != api.RoleManager && m != w.leader && w.isRecorded(m.name):
			w.leaveGroup(m)
		case m.member && role == api.RoleWorker && m == w.leader:
			w.note("%s is a worker now: it hands the leadership over", m.name)
			w.depose(m)
		case !m.member && role == api.RoleManager:
			w.enterGroup(m)
		}
		delete(roles, m.name)
	}
	for _, name := range w.names {
		if roles[name] == api.RoleManager {
			m := &manager{w: w, name: name, number: len(w.managers), skew: w.between(-3*time.Second, 3*time.Second)}
			w.managers = append(w.managers, m)
			w.enterGroup(m)
		}
	}
}

// isRecorded: managers are members before their nodes are recorded.
func (w *World) isRecorded(name string) bool { return w.nodes[name] != nil }

func (w *World) enterGroup(m *manager) {
	m.member, m.up, m.cut = true, true, false
	m.life++
	m.lag = false
	m.restore(w.log.observer, len(w.log.entries))
	w.note("%s joins the managers", m.name)
}

func (w *World) leaveGroup(m *manager) {
	m.member, m.up = false, false
	m.life++
	if m.term != nil {
		m.term.end()
	}
	w.note("%s leaves the managers", m.name)
}

// group is what control asks of the managers.
type group struct {
	w *World
	m *manager
}

func (g group) Linearize(context.Context) error {
	if g.w.leader != g.m {
		return api.Errorf(errdefs.ErrUnavailable, "read: this manager is not the leader")
	}
	return nil
}

func (g group) ManagerStatus(id string) (member, leader, reachable bool) {
	for _, m := range g.w.managers {
		if m.name == id && m.member {
			return true, g.w.leader == m, m.up && !m.cut
		}
	}
	return false, false, false
}

func (g group) RemoveManager(_ context.Context, id string) error {
	if g.w.leader != g.m {
		return errUnknown
	}
	for _, m := range g.w.managers {
		if m.name == id && m.member {
			g.w.leaveGroup(m)
		}
	}
	return nil
}

// renaming gives new objects names of this history in place of random ids, so that a seed always gives the same.
type renaming struct {
	*store.Store
	w *World
}

func (s renaming) Update(ctx context.Context, f func(store.WriteTx) error) (uint64, error) {
	return s.Store.Update(ctx, func(tx store.WriteTx) error {
		r := &renamer{WriteTx: tx, w: s.w}
		if err := f(r); err != nil {
			return err
		}
		for _, c := range r.changes {
			r.rename(c)
			tx.Add(c)
		}
		return nil
	})
}

type renamer struct {
	store.WriteTx
	w       *World
	changes []*api.Change
	id      string
}

func (r *renamer) Add(c *api.Change) { r.changes = append(r.changes, c) }

// rename: a change that expects that an object is not there makes one.
func (r *renamer) rename(c *api.Change) {
	switch k := c.Kind.(type) {
	case *api.Change_Expect:
		if k.Expect.Version == 0 {
			r.w.users.made++
			r.id = fmt.Sprintf("%s%d", k.Expect.Kind[:1], r.w.users.made)
			k.Expect.Id = r.id
		}
	case *api.Change_PutService:
		k.PutService.Id = either(r.id, k.PutService.Id)
	case *api.Change_PutNetwork:
		k.PutNetwork.Id = either(r.id, k.PutNetwork.Id)
	case *api.Change_PutDependency:
		k.PutDependency.Id = either(r.id, k.PutDependency.Id)
	}
}

func either(a, b string) string {
	if a != "" {
		return a
	}
	return b
}
