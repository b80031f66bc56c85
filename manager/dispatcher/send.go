package dispatcher

import (
	"hash/fnv"
	"math"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"skein/manager/api"
	"skein/manager/store"
)

// partBytes is about the size at which sets, tables and increments are cut into several messages.
const partBytes = api.MaxMessageBytes / 8

// sendTables gives changed tables their new version, tells their holders, and sees to it that each node holds what it needs.
func (d *Dispatcher) sendTables(version uint64) {
	for _, t := range d.spread.tables {
		d.spread.widen(t)
		if !t.changed.any {
			continue
		}
		t.version, t.at = version, time.Now()
		for id, since := range t.draining {
			if since == 0 {
				t.draining[id] = version
			}
		}
		delta := t.delta(d.spread.nodes)
		t.changed, t.encoded = newTableChanges(), nil
		d.sendDelta(t, delta)
	}
	for n := range d.spread.resubscribe {
		if n.session != nil && n.session.greeted {
			d.subscribe(n)
		}
	}
	clear(d.spread.resubscribe)
}

// sendDelta tells a table's holders what changed; what is too large for one message is told as the whole table, in parts.
func (d *Dispatcher) sendDelta(t *table, delta *api.TableUpdate) {
	var parts []part
	for _, n := range d.nodes {
		if n.session == nil || !n.session.tables[t.id] {
			continue
		}
		if parts == nil {
			if m, size := encoded(tableMessage(delta)); size <= partBytes {
				parts = []part{{m, size}}
			} else {
				parts = t.full(d.spread.nodes)
			}
		}
		n.session.pushAll(parts)
	}
}

// subscribe sends a node the tables that it needs and does not hold, and takes back the others.
func (d *Dispatcher) subscribe(n *node) {
	s := n.session
	give := func(id string) {
		t := d.spread.tables[id]
		if t == nil || s.tables[id] {
			return
		}
		s.tables[id] = true
		if t.sum != 0 && s.holds[id] == t.sum {
			s.push(tableMessage(&api.TableUpdate{Table: id, Version: t.version, Same: true, Digest: t.sum}), 0)
		} else {
			s.pushAll(t.full(d.spread.nodes))
		}
	}
	give(api.MeshTable)
	for id := range n.nets {
		give(id)
	}
	for id := range s.tables {
		if id != api.MeshTable && n.nets[id] == 0 {
			delete(s.tables, id)
			delete(s.holds, id)
			delete(n.acked, id)
			s.push(tableMessage(&api.TableUpdate{Table: id, Gone: true}), 0)
		}
	}
}

// part is a message that several sessions are sent.
type part struct {
	msg  *api.ManagerMessage
	size int
}

func (s *session) pushAll(parts []part) {
	for _, p := range parts {
		s.push(p.msg, p.size)
	}
}

func tableMessage(u *api.TableUpdate) *api.ManagerMessage {
	return &api.ManagerMessage{Kind: &api.ManagerMessage_Table{Table: u}}
}

// delta is what changed since the version before. It keeps the digest up to date: a sum over the records, which their order does not change.
func (t *table) delta(nodes map[uint32]*api.NodeEndpoint) *api.TableUpdate {
	u := &api.TableUpdate{Table: t.id, Version: t.version}
	if t.changed.network {
		u.Network = t.network
		t.note("n", t.network)
	}
	for i := range t.changed.nodes {
		key := "i" + strconv.FormatUint(uint64(i), 10)
		if t.lists(i) && nodes[i] != nil {
			u.Nodes = append(u.Nodes, nodes[i])
			t.note(key, nodes[i])
		} else {
			u.RemovedNodes = append(u.RemovedNodes, i)
			t.note(key, nil)
		}
	}
	for id := range t.changed.services {
		if s := t.services[id]; s != nil {
			u.Services = append(u.Services, s)
			t.note("s"+id, s)
		} else {
			u.RemovedServices = append(u.RemovedServices, id)
			t.note("s"+id, nil)
		}
	}
	for id := range t.changed.endpoints {
		if e := t.endpoints[id]; e != nil {
			u.Endpoints = append(u.Endpoints, e)
			t.note("e"+id, e)
		} else {
			u.RemovedEndpoints = append(u.RemovedEndpoints, id)
			t.note("e"+id, nil)
		}
	}
	u.Digest = t.sum
	return u
}

// note replaces a record in the digest; nil takes it out.
func (t *table) note(key string, rec proto.Message) {
	t.sum -= t.sums[key]
	if rec == nil {
		delete(t.sums, key)
		return
	}
	h := fnv.New64a()
	_, _ = h.Write([]byte(key)) // never fails
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(rec)
	if err == nil {
		_, _ = h.Write(b)
	}
	t.sums[key] = h.Sum64()
	t.sum += t.sums[key]
}

// full is the whole table in its newest version, encoded once for all that need it.
func (t *table) full(nodes map[uint32]*api.NodeEndpoint) []part {
	if t.encoded != nil {
		return t.encoded
	}
	u, size := &api.TableUpdate{Table: t.id, Version: t.version, Full: true, Network: t.network}, 0
	cut := func(more bool) {
		u.More = more
		if !more {
			u.Digest = t.sum
		}
		m, n := encoded(tableMessage(u))
		t.encoded = append(t.encoded, part{m, n})
		u, size = &api.TableUpdate{Table: t.id, Version: t.version, Full: true, Part: u.Part + 1}, 0
	}
	grow := func(rec proto.Message) {
		if size += proto.Size(rec); size > partBytes {
			cut(true)
		}
	}
	for i := range nodes {
		if t.lists(i) {
			u.Nodes = append(u.Nodes, nodes[i])
			grow(nodes[i])
		}
	}
	for _, s := range t.services {
		u.Services = append(u.Services, s)
		grow(s)
	}
	for _, e := range t.endpoints {
		u.Endpoints = append(u.Endpoints, e)
		grow(e)
	}
	cut(false)
	return t.encoded
}

// ack notes what a node applied.
func (d *Dispatcher) ack(n *node, a *api.TableAck) {
	if !n.session.tables[a.Table] {
		return // it holds the table no more, or never did
	}
	if a.Err != "" && n.acked[a.Table].GetErr() != a.Err {
		d.cfg.Log.Warn("node could not apply a table", "node", n.id, "table", a.Table, "err", clip(a.Err))
	}
	n.acked[a.Table] = &api.TableAck{Table: a.Table, Version: a.Version, Err: clip(a.Err)}
	if len(d.spread.stopping) > 0 {
		d.dirty.drains = true
		d.schedule()
	}
}

// settleDrains finds the tasks that every node with a say has out of rotation.
func (d *Dispatcher) settleDrains() {
	if len(d.spread.stopping) == 0 {
		return
	}
	acked := map[string]uint64{} // per table: what every node with a say has applied
	for id := range d.spread.stopping {
		e := d.tasks[id]
		out := true
		for _, table := range e.tables() {
			t := d.spread.tables[table]
			if t == nil {
				continue
			}
			least, ok := acked[table]
			if !ok {
				least = d.leastAcked(table)
				acked[table] = least
			}
			if since, draining := t.draining[id]; draining && least < since {
				out = false
				break
			}
		}
		if out {
			e.drained = true
			delete(d.spread.stopping, id)
			d.touch(e, id)
		}
	}
}

func (d *Dispatcher) leastAcked(table string) uint64 {
	least := uint64(math.MaxUint64)
	for _, n := range d.nodes {
		if n.hasSay() && (table == api.MeshTable || n.nets[table] > 0) {
			least = min(least, n.acked[table].GetVersion())
		}
	}
	return least
}

// sendAssignments sends the nodes concerned what changed for them.
func (d *Dispatcher) sendAssignments(tx store.ReadTx) {
	now := d.spread.reassign
	if len(now) > tellBound {
		now = now[:tellBound]
	}
	for _, n := range now {
		n.listed = false
		if n.session != nil && n.session.greeted {
			d.sendChanged(tx, n)
		}
		for _, id := range n.changed {
			if e := d.tasks[id]; e != nil {
				e.queued = false
			}
		}
		n.changed, n.removed = nil, nil
	}
	d.told += len(now)
	if d.spread.reassign = d.spread.reassign[len(now):]; len(d.spread.reassign) == 0 {
		d.spread.reassign = nil
	}
}

// tell has a node looked at in its turn.
func (s *spread) tell(n *node) {
	if !n.listed {
		n.listed = true
		s.reassign = append(s.reassign, n)
	}
}

// outgoing gathers assignments for one session and cuts them into messages.
type outgoing struct {
	d    *Dispatcher
	s    *session
	full bool
	sum  int // tasks of a full set
	u    *api.AssignmentUpdate
	size int
}

func (o *outgoing) begin() {
	o.u, o.size = &api.AssignmentUpdate{Full: o.full}, 0
}

func (o *outgoing) send(more bool) {
	o.s.sequence++
	o.u.Sequence = o.s.sequence
	if o.full {
		if o.u.More = more; !more {
			o.u.Total = uint32(o.sum)
		}
	}
	o.s.push(&api.ManagerMessage{Kind: &api.ManagerMessage_Assignments{Assignments: o.u}}, o.size)
	o.begin()
}

// add appends a task, and what the agent needs to know for it.
func (o *outgoing) add(tx store.ReadTx, t *store.Task, e *taskEntry) {
	s := o.s
	if e.sent != s {
		e.sent, e.templated = s, false
	}
	e.desired, e.startAfter, e.saidDrain = t.Desired, t.StartAfter, e.drained
	a := o.d.assignment(tx, t, e)
	if a.Templated {
		if !e.templated {
			e.templated = true
			if m := o.d.provide(s, tx, e.template); m != nil {
				o.u.Templates = append(o.u.Templates, m)
				o.size += e.template.size
			}
		}
	}
	o.u.Networks = append(o.u.Networks, o.d.newNetworks(s, tx, t)...)
	o.u.Set = append(o.u.Set, a)
	o.sum++
	if o.size += proto.Size(a); o.size > partBytes {
		o.send(true)
	}
}

func (d *Dispatcher) sendChanged(tx store.ReadTx, n *node) {
	o := outgoing{d: d, s: n.session}
	o.begin()
	o.u.Removed = n.removed
	for _, id := range n.changed {
		e := d.tasks[id]
		if e == nil || e.node != n {
			continue
		}
		t := tx.Task(id)
		if t == nil || (e.sent == n.session && e.desired == t.Desired && e.startAfter == t.StartAfter && e.saidDrain == e.drained) {
			continue
		}
		o.add(tx, t, e)
	}
	if len(o.u.Set)+len(o.u.Removed) > 0 {
		o.send(false)
	}
}

// newNetworks are the networks of a task that its node does not know in their newest version.
func (d *Dispatcher) newNetworks(s *session, tx store.ReadTx, t *store.Task) []*api.NetworkRecord {
	var out []*api.NetworkRecord
	for _, a := range t.Attachments {
		if n := tx.Network(a.NetworkId); n != nil && s.networks[n.Id] != n.Meta.GetVersion() {
			s.networks[n.Id] = n.Meta.GetVersion()
			out = append(out, n)
		}
	}
	return out
}

// greet sends a new session everything: who is who, the full set, the tables.
func (d *Dispatcher) greet(tx store.ReadTx, n *node) {
	s := n.session
	s.greeted = true
	if told := s.welcomed; told != n.rec && tellsMore(told, n.rec) {
		d.sayWelcome(tx, s, n.rec)
	}
	d.greetCredentials(tx, n)
	s.push(d.managerList(tx))
	o := outgoing{d: d, s: s, full: true}
	o.begin()
	for _, t := range tx.TasksByNode(n.id) {
		if e := d.tasks[t.ID]; e != nil {
			o.add(tx, t, e)
		}
	}
	o.send(false)
	d.subscribe(n)
	for id := range n.acked {
		if !s.tables[id] { // needed before, when another leader sent it
			s.push(tableMessage(&api.TableUpdate{Table: id, Gone: true}), 0)
			delete(n.acked, id)
		}
	}
	s.holds = nil
}

// sayWelcome tells an agent who its node is.
func (d *Dispatcher) sayWelcome(tx store.ReadTx, s *session, rec *store.Node) {
	c := tx.Cluster()
	s.welcomed = rec
	s.push(&api.ManagerMessage{Kind: &api.ManagerMessage_Welcome{Welcome: &api.Welcome{
		SessionId: s.id, HeartbeatMillis: uint32(heartbeat.Milliseconds()), LeaseMillis: uint32(lease.Milliseconds()),
		NodeIndex: rec.Index, Node: rec, DataPort: c.GetDataPort(), MeshPool: c.GetMeshPool(), MeshPool6: c.GetUlaPrefix(), Term: d.cfg.Term,
	}}}, 0)
}

// managerList is the list of managers, encoded once until it changes.
func (d *Dispatcher) managerList(tx store.ReadTx) (*api.ManagerMessage, int) {
	if d.managers == nil {
		list := &api.ManagerList{}
		for _, n := range tx.Nodes() {
			if n.Role == api.RoleManager && n.RpcAddr != "" && !hasLeft(n) {
				list.Managers = append(list.Managers, &api.ManagerPeer{NodeId: n.Id, RpcAddr: n.RpcAddr, Leader: n.Id == d.cfg.NodeID})
			}
		}
		d.managers, d.managersSize = encoded(&api.ManagerMessage{Kind: &api.ManagerMessage_Managers{Managers: list}})
	}
	return d.managers, d.managersSize
}

// assignment is a task as its node has to know it. Of an ended task, whose container only waits for its removal, little is left.
func (d *Dispatcher) assignment(tx store.ReadTx, t *store.Task, e *taskEntry) *api.Assignment {
	a := &api.Assignment{
		TaskId: t.ID, ServiceId: t.ServiceID, Slot: t.Slot, NodeId: t.NodeID, Revision: t.Revision, Desired: uint32(t.Desired),
		State: uint32(t.State), StartAfter: t.StartAfter, Drained: e.drained,
	}
	if t.State.Terminal() || e.template == nil {
		return a
	}
	a.Templated = true
	if e.stopping {
		a.DrainTimeout = d.drainTimeoutFor(tx, t, e)
	}
	if svc := tx.Service(t.ServiceID); svc != nil && t.State < api.TaskRunning { // not in the template: they may be replaced within a revision
		a.RegistryAuth = svc.RegistryAuth(t.Revision)
	}
	a.Attachments = t.Attachments
	a.Gateway4, a.Gateway6 = plain(t.Gateway4), plain(t.Gateway6)
	a.Generic = tx.TaskExtra(t.ID).GetGeneric()
	return a
}

func plain(a netip.Addr) string {
	if !a.IsValid() {
		return ""
	}
	return a.String()
}

// bare takes the prefix length off an address.
func bare(s string) string {
	addr, _, _ := strings.Cut(s, "/")
	return addr
}
