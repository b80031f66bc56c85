package dispatcher

import (
	"encoding/json"
	"maps"
	"math"
	"net/netip"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"

	"skein/manager/api"
	"skein/manager/store"
)

// updateBytes is about the size at which increments are cut into several messages.
const updateBytes = api.MaxMessageBytes / 2

// sentTask is what makes an assignment differ for its agent: the rest is fixed when a task is placed.
type sentTask struct {
	desired    api.TaskState
	startAfter int64
	drained    bool
}

// release notes that the agent forgets a task, and with it the secrets and configs that only this task needed.
func (s *session) release(task string) {
	for _, id := range s.needs[task] {
		if s.deps[id]--; s.deps[id] <= 0 {
			delete(s.deps, id) // the agent forgets it, too
		}
	}
	delete(s.needs, task)
}

// provide sends the secrets and configs of a task that its node does not hold. It comes before the assignment.
func (d *Dispatcher) provide(s *session, tx store.ReadTx, a *api.Assignment) {
	if _, known := s.needs[a.TaskId]; known || len(a.Dependencies) == 0 {
		return
	}
	s.needs[a.TaskId] = a.Dependencies
	for _, id := range a.Dependencies {
		if s.deps[id]++; s.deps[id] > 1 {
			continue
		}
		if rec := tx.Dependency(id); rec != nil {
			s.push(&api.ManagerMessage{Kind: &api.ManagerMessage_Dependencies{Dependencies: &api.DependencyUpdate{Set: []*api.DependencyRecord{rec}}}})
		}
	}
}

// sendTables gives changed tables their new version, tells their holders, and sees to it that each node holds what it needs.
func (d *Dispatcher) sendTables(version uint64) {
	for _, t := range d.spread.tables {
		if !t.changed.any {
			continue
		}
		t.version = version
		for id, since := range t.draining {
			if since == 0 {
				t.draining[id] = version
			}
		}
		delta := tableMessage(t.delta(d.spread.nodes))
		t.changed = newTableChanges()
		for _, n := range d.nodes {
			if n.session != nil && n.session.tables[t.id] {
				n.session.push(delta)
			}
		}
	}
	for n := range d.spread.resubscribe {
		if n.session != nil {
			d.subscribe(n)
		}
	}
	clear(d.spread.resubscribe)
}

// subscribe sends a node the tables that it needs and does not hold, and takes back the others.
func (d *Dispatcher) subscribe(n *node) {
	s := n.session
	give := func(id string) {
		if t := d.spread.tables[id]; t != nil && !s.tables[id] {
			s.tables[id] = true
			s.push(tableMessage(t.full(d.spread.nodes)))
		}
	}
	give(api.MeshTable)
	for id := range n.nets {
		give(id)
	}
	for id := range s.tables {
		if id != api.MeshTable && n.nets[id] == 0 {
			delete(s.tables, id)
			delete(n.acked, id)
			s.push(tableMessage(&api.TableUpdate{Table: id, Gone: true}))
		}
	}
}

func tableMessage(u *api.TableUpdate) *api.ManagerMessage {
	return &api.ManagerMessage{Kind: &api.ManagerMessage_Table{Table: u}}
}

func (t *table) delta(nodes map[uint32]*api.NodeEndpoint) *api.TableUpdate {
	u := &api.TableUpdate{Table: t.id, Version: t.version}
	if t.changed.network {
		u.Network = t.network
	}
	for i := range t.changed.nodes {
		if t.nodes[i] > 0 && nodes[i] != nil {
			u.Nodes = append(u.Nodes, nodes[i])
		} else {
			u.RemovedNodes = append(u.RemovedNodes, i)
		}
	}
	for id := range t.changed.services {
		if s := t.services[id]; s != nil {
			u.Services = append(u.Services, s)
		} else {
			u.RemovedServices = append(u.RemovedServices, id)
		}
	}
	for id := range t.changed.endpoints {
		if e := t.endpoints[id]; e != nil {
			u.Endpoints = append(u.Endpoints, e)
		} else {
			u.RemovedEndpoints = append(u.RemovedEndpoints, id)
		}
	}
	return u
}

func (t *table) full(nodes map[uint32]*api.NodeEndpoint) *api.TableUpdate {
	u := &api.TableUpdate{
		Table: t.id, Version: t.version, Full: true, Network: t.network,
		Services: slices.Collect(maps.Values(t.services)), Endpoints: slices.Collect(maps.Values(t.endpoints)),
	}
	for i := range t.nodes {
		if nodes[i] != nil {
			u.Nodes = append(u.Nodes, nodes[i])
		}
	}
	return u
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
			d.touch(e.node, id)
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
	for n := range d.spread.reassign {
		if n.session != nil {
			d.sendChanged(tx, n)
		}
		clear(n.changed)
	}
	clear(d.spread.reassign)
}

func (d *Dispatcher) sendChanged(tx store.ReadTx, n *node) {
	s := n.session
	u, size := &api.AssignmentUpdate{}, 0
	send := func() {
		s.sequence++
		u.Sequence = s.sequence
		s.push(&api.ManagerMessage{Kind: &api.ManagerMessage_Assignments{Assignments: u}})
		u, size = &api.AssignmentUpdate{}, 0
	}
	for id := range n.changed {
		e := d.tasks[id]
		before, sent := s.sent[id]
		if e == nil || e.node != n.id {
			if sent {
				delete(s.sent, id)
				s.release(id)
				u.Removed = append(u.Removed, id)
			}
			continue
		}
		t := tx.Task(id)
		now := sentTask{desired: t.Desired, startAfter: t.StartAfter, drained: e.drained}
		if sent && before == now {
			continue
		}
		s.sent[id] = now
		a := d.assignment(tx, t, e)
		d.provide(s, tx, a)
		u.Networks = append(u.Networks, d.newNetworks(s, tx, t)...)
		u.Set = append(u.Set, a)
		if size += proto.Size(a); size > updateBytes {
			send()
		}
	}
	if len(u.Set)+len(u.Removed) > 0 {
		send()
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
	s.push(d.welcome(tx, n))
	d.greetCredentials(tx, n)
	s.push(d.managerList(tx))
	u := &api.AssignmentUpdate{Sequence: 1, Full: true}
	for _, t := range tx.TasksByNode(n.id) {
		e := d.tasks[t.ID]
		if e == nil {
			continue
		}
		s.sent[t.ID] = sentTask{desired: t.Desired, startAfter: t.StartAfter, drained: e.drained}
		u.Networks = append(u.Networks, d.newNetworks(s, tx, t)...)
		a := d.assignment(tx, t, e)
		d.provide(s, tx, a)
		u.Set = append(u.Set, a)
	}
	s.sequence = 1
	clear(n.changed)
	s.push(&api.ManagerMessage{Kind: &api.ManagerMessage_Assignments{Assignments: u}})
	d.subscribe(n)
	for id := range n.acked {
		if !s.tables[id] { // needed before, when another leader sent it
			s.push(tableMessage(&api.TableUpdate{Table: id, Gone: true}))
			delete(n.acked, id)
		}
	}
}

func (d *Dispatcher) welcome(tx store.ReadTx, n *node) *api.ManagerMessage {
	c := tx.Cluster()
	return &api.ManagerMessage{Kind: &api.ManagerMessage_Welcome{Welcome: &api.Welcome{
		SessionId: n.session.id, HeartbeatMillis: uint32(heartbeat.Milliseconds()), LeaseMillis: uint32(lease.Milliseconds()),
		NodeIndex: n.rec.Index, Node: n.rec, DataPort: c.GetDataPort(), MeshPool: c.GetMeshPool(),
	}}}
}

func (d *Dispatcher) managerList(tx store.ReadTx) *api.ManagerMessage {
	list := &api.ManagerList{}
	for _, n := range tx.Nodes() {
		if n.Role == api.RoleManager && n.RpcAddr != "" {
			list.Managers = append(list.Managers, &api.ManagerPeer{NodeId: n.Id, RpcAddr: n.RpcAddr, Leader: n.Id == d.cfg.NodeID})
		}
	}
	return &api.ManagerMessage{Kind: &api.ManagerMessage_Managers{Managers: list}}
}

// assignment is a task as its node has to know it. Of an ended task, whose container only waits for its removal, little is left.
func (d *Dispatcher) assignment(tx store.ReadTx, t *store.Task, e *taskEntry) *api.Assignment {
	a := &api.Assignment{
		TaskId: t.ID, ServiceId: t.ServiceID, Slot: t.Slot, NodeId: t.NodeID, Revision: t.Revision, Desired: uint32(t.Desired),
		State: uint32(t.State), StartAfter: t.StartAfter, Drained: e.drained,
	}
	svc := tx.Service(t.ServiceID)
	if svc == nil {
		return a
	}
	a.ServiceName = svc.Name
	spec := svc.Revs[t.Revision]
	if t.State.Terminal() || spec == nil {
		return a
	}
	var err error
	if a.SpecJson, err = json.Marshal(spec.TaskTemplate); err != nil {
		d.cfg.Log.Error("encode task spec", "service", svc.Id, "revision", t.Revision, "err", err)
	}
	if len(spec.Labels) > 0 {
		a.ServiceLabelsJson, _ = json.Marshal(spec.Labels) // a map of strings always has a JSON form
	}
	a.Attachments, a.Ports, a.Dependencies = t.Attachments, svc.Ports, store.DependencyIDs(spec)
	a.Gateway4, a.Gateway6 = plain(t.Gateway4), plain(t.Gateway6)
	return a
}

func (d *Dispatcher) netStatus() []*api.NetStatusRow {
	var rows []*api.NetStatusRow
	for _, n := range d.nodes {
		row := func(id string) {
			t := d.spread.tables[id]
			if t == nil {
				return
			}
			ack := n.acked[id]
			rows = append(rows, &api.NetStatusRow{NodeId: n.id, Table: id, Desired: t.version, Applied: ack.GetVersion(), Live: n.hasSay(), Err: ack.GetErr()})
		}
		row(api.MeshTable)
		for id := range n.nets {
			row(id)
		}
	}
	slices.SortFunc(rows, func(a, b *api.NetStatusRow) int {
		if c := strings.Compare(a.NodeId, b.NodeId); c != 0 {
			return c
		}
		return strings.Compare(a.Table, b.Table)
	})
	return rows
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
