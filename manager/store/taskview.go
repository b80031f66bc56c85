package store

import (
	"encoding/hex"
	"fmt"
	"net/netip"
	"strings"

	"skein/manager/allocator"
	"skein/manager/api"
)

// TaskRef is a task in a view, as it is stored: reading it allocates nothing. It is valid as long as its view.
type TaskRef struct {
	t  *taskTable
	id rowID
	r  *taskRow
}

func (t *taskTable) ref(id rowID) TaskRef { return TaskRef{t, id, t.row(id)} }

// Valid reports whether there is a task: the zero TaskRef stands for none.
func (r TaskRef) Valid() bool { return r.t != nil }

// ID is the task's id; it is made anew by each call.
func (r TaskRef) ID() string { return r.r.id().String() }

// Num is the task's id in compact form.
func (r TaskRef) Num() api.ID { return r.r.id() }

// ServiceID is the id of its service, which may be gone.
func (r TaskRef) ServiceID() string { return r.t.lists.services.id[r.r.service] }

// NodeID is empty until the task is placed.
func (r TaskRef) NodeID() string { return r.t.lists.nodes.id[r.r.node] }

// Slot is 0 for global services.
func (r TaskRef) Slot() uint64 { return r.r.slot }

// Generation grows within a slot.
func (r TaskRef) Generation() uint32 { return r.r.generation }

// Revision is that of its service's spec.
func (r TaskRef) Revision() uint64 { return uint64(r.r.revision) }

// State is the observed state.
func (r TaskRef) State() api.TaskState { return api.TaskState(r.r.state) }

// Desired is the state it shall reach.
func (r TaskRef) Desired() api.TaskState { return api.TaskState(r.r.desired) }

// Version is the Raft index of its last change.
func (r TaskRef) Version() uint64 { return r.r.version }

// Created, Updated and Started are entry times in nanoseconds; Started is 0 before the first RUNNING report.
func (r TaskRef) Created() int64 { return r.r.created }

// Updated is the time of its last change.
func (r TaskRef) Updated() int64 { return r.r.updated }

// Started is the time of its first RUNNING report.
func (r TaskRef) Started() int64 { return r.r.started }

// Live is as Task's.
func (r TaskRef) Live() bool { return r.r.live() }

// StartAfter is as Task's.
func (r TaskRef) StartAfter() int64 { return readSide(r.t.sideOf(r.id)).startAfter }

// HasStatus reports whether anything was said of the task.
func (r TaskRef) HasStatus() bool { return readSide(r.t.sideOf(r.id)).flags&sideStatus != 0 }

// Attached reports whether the task has, or had before it ended, an address on any network, or a gateway.
func (r TaskRef) Attached() bool {
	return readSide(r.t.sideOf(r.id)).flags&(sideAddresses|sideGateway) != 0
}

// Task is the whole task; it may be kept.
func (r TaskRef) Task() *Task { return r.t.task(r.id) }

// slabRows bounds how many tasks share memory: whoever keeps one keeps them all.
const slabRows = 16

// slab makes tasks out of rows, with few allocations for many of them.
type slab struct {
	t       *taskTable
	tasks   []Task
	reports []api.TaskReport
	text    strings.Builder
	hex     [64]byte
}

func (t *taskTable) task(id rowID) *Task {
	if id == 0 {
		return nil
	}
	s := slab{t: t}
	s.begin(1, id)
	return s.add(id)
}

// all makes tasks of rows.
func (t *taskTable) all(ids []rowID) []*Task {
	if len(ids) == 0 {
		return nil
	}
	out := make([]*Task, len(ids))
	var s slab
	for i, id := range ids {
		if i%slabRows == 0 {
			s = slab{t: t}
			s.begin(min(slabRows, len(ids)-i), ids[i])
		}
		out[i] = s.add(id)
	}
	return out
}

// begin makes room for n tasks like the given one.
func (s *slab) begin(n int, like rowID) {
	s.tasks = make([]Task, 0, n)
	size := 26
	if s.t.row(like).sideLen > 40 {
		size += 64 // a container id
	}
	s.text.Grow(n * size)
}

func (s *slab) add(id rowID) *Task {
	r := s.t.row(id)
	b := s.t.sideOf(id)
	at := s.text.Len()
	var text [32]byte
	s.text.Write(r.id().Append(text[:0]))
	s.tasks = append(s.tasks, Task{
		ID: s.text.String()[at:], ServiceID: s.t.lists.services.id[r.service], Slot: r.slot, Generation: r.generation, Revision: uint64(r.revision),
		NodeID: s.t.lists.nodes.id[r.node], State: api.TaskState(r.state), Desired: api.TaskState(r.desired), Version: r.version,
		Created: r.created, Updated: r.updated, Started: r.started,
	})
	t := &s.tasks[len(s.tasks)-1]
	if len(b) == 0 {
		return t
	}
	d := readSide(b)
	t.StartAfter = d.startAfter
	if len(d.extra) > 0 {
		t.Restarts = readExtra(d.extra).Restarts
	}
	t.Gateway4, t.Gateway6, t.HostPorts = s.t.forms.gatewayAndPorts(d)
	t.Attachments = s.t.forms.attachments(d)
	if d.flags&sideStatus != 0 {
		if cap(s.reports) == len(s.reports) {
			s.reports = make([]api.TaskReport, 0, cap(s.tasks)-len(s.tasks)+1)
		}
		s.reports = s.reports[:len(s.reports)+1]
		t.Status = &s.reports[len(s.reports)-1]
		if err := readStatus(t.Status, d, r, t.ID, t.NodeID, s.string); err != nil {
			panic(err) // it was encoded here
		}
	}
	return t
}

// string makes a text of bytes, or of the hexadecimal digits of others.
func (s *slab) string(hexed, plain []byte) string {
	at := s.text.Len()
	if len(hexed) > 0 {
		hex.Encode(s.hex[:], hexed)
		plain = s.hex[:2*len(hexed)]
	}
	if at+len(plain) > s.text.Cap() {
		return string(plain)
	}
	s.text.Write(plain)
	return s.text.String()[at:]
}

func (x *formTable) gatewayAndPorts(d side) (v4, v6 netip.Addr, ports []*api.PortConfig) {
	if d.flags&sideGateway != 0 {
		v4, v6 = x.list[d.gateway].gateway(d.gatewayOff)
	}
	if d.flags&sidePorts != 0 {
		ports = x.list[d.ports].portList
	}
	return v4, v6, ports
}

// attachments are a task's addresses as the API has them.
func (x *formTable) attachments(d side) []*api.Attachment {
	var out []*api.Attachment
	d.eachAddress(func(n, off uint32) {
		a := x.list[n].address(off)
		out = append(out, attachmentOf(&a))
	})
	return out
}

func attachmentOf(a *allocator.Address) *api.Attachment {
	out := &api.Attachment{NetworkId: a.NetworkID, Addr4: a.V4.String(), Aliases: a.Aliases}
	if a.V6.IsValid() {
		out.Addr6 = a.V6.String()
	}
	return out
}

// grantOf is what a record says that its task holds.
func grantOf(r *api.TaskRecord) (g allocator.TaskGrant, err error) {
	for _, a := range r.Attachments {
		c := allocator.Address{NetworkID: a.NetworkId, Aliases: a.Aliases}
		if c.V4, err = netip.ParsePrefix(a.Addr4); err != nil || !c.V4.Addr().Is4() {
			return g, fmt.Errorf("address %q on network %s is not one of IPv4", a.Addr4, a.NetworkId)
		}
		if a.Addr6 != "" {
			if c.V6, err = netip.ParsePrefix(a.Addr6); err != nil || c.V6.Addr().Is4() {
				return g, fmt.Errorf("address %q on network %s is not one of IPv6", a.Addr6, a.NetworkId)
			}
		}
		g.Addresses = append(g.Addresses, c)
	}
	if g.Gateway4, err = parseAddr(r.Gateway4); err == nil {
		g.Gateway6, err = parseAddr(r.Gateway6)
	}
	if err == nil && (g.Gateway4.Is6() || g.Gateway6.Is4()) {
		err = fmt.Errorf("addresses %s and %s of the gateway are in each other's place", g.Gateway4, g.Gateway6)
	}
	g.HostPorts = r.HostPorts
	return g, err
}
