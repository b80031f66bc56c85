package store

import (
	"errors"
	"math"

	"google.golang.org/protobuf/proto"

	"skein/manager/allocator"
	"skein/manager/api"
)

// columnReader reads tasks from a snapshot's columns.
type columnReader struct {
	names   *api.TaskNames
	forms   []uint32 // by number in the snapshot: this process's
	offsets []int64  // the last by form
}

var errShort = errors.New("a column ends early")

// loadNames takes over the names of the columns that follow.
func (l *loader) loadNames(n *api.TaskNames) error {
	l.s.tasks.forms.limit = max(firstForms, 2*len(n.Forms)) // nothing has these yet: do not sweep them
	c := columnReader{names: n, forms: make([]uint32, len(n.Forms)), offsets: make([]int64, len(n.Forms))}
	for i, f := range n.Forms {
		if !validForm(f) {
			return damaged("form %d of addresses is not one", i)
		}
		e := &formEntry{aliasList: f.Aliases, portList: f.Ports}
		e.form = form{network: f.NetworkId, bits4: uint8(f.Bits4), bits6: uint8(f.Bits6), has6: len(f.Base6) > 0}
		copy(e.base4[:], f.Base4)
		copy(e.base6[:], f.Base6)
		e.setAliases(f.Aliases)
		if len(f.Ports) > 0 {
			e.ports = string(marshalPorts(nil, f.Ports))
		}
		c.forms[i] = l.s.tasks.forms.of(e.form, func() *formEntry { return e })
	}
	l.columns = c
	return nil
}

func validForm(f *api.AddressForm) bool {
	return (len(f.Base4) == 4 || (len(f.Base4) == 0 && f.Bits4 == 0)) && (len(f.Base6) == 16 || len(f.Base6) == 0) && f.Bits4 <= 32 && f.Bits6 <= 128 &&
		(f.NetworkId == "" || f.Bits4 > 0)
}

// cursor walks through the columns of one chunk. The first value that is missing makes bad true.
type cursor struct {
	c          *api.TaskColumns
	forms      int
	offsets    int
	addresses  int
	started    int
	startAfter int
	times      int
	texts      int
	containers int
	pids       int
	exits      int
	statuses   int
	extras     int
	bad        bool
}

func take[T any](k *cursor, list []T, at *int) (v T) {
	if *at >= len(list) {
		k.bad = true
		return v
	}
	v = list[*at]
	*at++
	return v
}

func (l *loader) loadColumns(c *api.TaskColumns) error {
	n := int(c.Count)
	for _, list := range runColumns(c) {
		var ok bool
		if *list, ok = outOfRuns(*list, 4*16*columnRows); !ok {
			return damaged("columns of tasks: a column's runs are out of bounds")
		}
	}
	if l.columns.names == nil || n > columnRows*16 || n != len(c.Slots) || n != len(c.Generations) || n != len(c.Revisions) || n != len(c.Nodes) ||
		n != len(c.States) || n != len(c.Desired) || n != len(c.Entries) || n != len(c.Created) || n != len(c.Flags) ||
		len(c.EntryVersions) != len(c.EntryTimes) || len(c.Services)%2 != 0 {
		return damaged("columns of tasks have different lengths, or no names come before them")
	}
	for i := 1; i < len(c.EntryVersions); i++ {
		c.EntryVersions[i] += c.EntryVersions[i-1]
		c.EntryTimes[i] += c.EntryTimes[i-1]
	}
	k := &cursor{c: c}
	var row taskRow
	service, left := 0, uint32(0)
	for i := range n {
		if left == 0 {
			if 2*service >= len(c.Services) || int(c.Services[2*service]) >= len(l.columns.names.Services) {
				return damaged("columns of tasks: no service for task %d", i)
			}
			left = c.Services[2*service+1]
			service++
		}
		left--
		if err := l.loadColumn(k, i, &row, l.columns.names.Services[c.Services[2*service-2]]); err != nil {
			return err
		}
	}
	return nil
}

// loadColumn loads task i; row is the one before.
func (l *loader) loadColumn(k *cursor, i int, row *taskRow, service string) error {
	c := k.c
	row.slot += uint64(c.Slots[i])
	generation, revision := int64(row.generation)+c.Generations[i], int64(row.revision)+c.Revisions[i]
	state, desired := int64(row.state)+c.States[i], int64(row.desired)+c.Desired[i]
	if min(generation, revision, state, desired) < 0 || max(generation, revision, desired) > math.MaxUint32 || state > math.MaxUint16 ||
		int(c.Entries[i]) >= len(c.EntryTimes) || int(c.Nodes[i]) > len(l.columns.names.Nodes) {
		return damaged("columns of tasks: task %d is out of bounds", i)
	}
	row.generation, row.revision, row.state, row.desired = uint32(generation), uint32(revision), uint16(state), uint32(desired)
	row.version, row.updated = uint64(c.EntryVersions[c.Entries[i]]), c.EntryTimes[c.Entries[i]]
	row.created += c.Created[i]
	row.started, row.side, row.sideLen = 0, 0, 0
	node, idNode := "", ""
	if n := c.Nodes[i]; n != 0 {
		node = l.columns.names.Nodes[n-1]
	}
	if row.slot == 0 {
		idNode = node
	}
	id := api.TaskIDOf(service, row.slot, idNode, row.generation)
	row.idTop, row.idHi, row.idLo = id.Top, id.Hi, id.Lo
	flags := uint32(c.Flags[i])
	if flags&colStarted != 0 {
		row.started = row.updated - take(k, c.Started, &k.started)
	}
	if err := l.heldColumns(k, flags, row); err != nil {
		return damaged("columns of tasks: task %d: %v", i, err)
	}
	status, container, err := k.status(flags, row)
	if err != nil || k.bad {
		return damaged("columns of tasks: task %d: %v", i, errors.Join(err, errShort))
	}
	if status != nil && flags&colByNode != 0 {
		status.NodeId = node
	}
	return l.loadRow(row, service, node, status, container)
}

// heldColumns encodes what a task waits for and holds into l.s.side.
func (l *loader) heldColumns(k *cursor, flags uint32, row *taskRow) error {
	c, x := k.c, l.s.tasks.forms
	startAfter, extra := int64(0), []byte(nil)
	if flags&colStartAfter != 0 {
		startAfter = take(k, c.StartAfter, &k.startAfter) + row.created
	}
	if flags&colExtra != 0 {
		if extra = take(k, c.Extras, &k.extras); proto.Unmarshal(extra, &api.TaskRecord{}) != nil {
			return errors.New("its extra fields are no message")
		}
	}
	g := &l.s.grant
	*g = allocator.TaskGrant{Addresses: g.Addresses[:0], HostPorts: g.HostPorts[:0]}
	form := func() (uint32, error) {
		n := take(k, c.Forms, &k.forms)
		if k.bad || int(n) >= len(l.columns.forms) {
			return 0, errShort
		}
		return n, nil
	}
	offset := func(n uint32) uint32 {
		l.columns.offsets[n] += take(k, c.Offsets, &k.offsets)
		return uint32(l.columns.offsets[n])
	}
	if flags&colAddresses != 0 {
		for range take(k, c.Addresses, &k.addresses) {
			n, err := form()
			if err != nil {
				return err
			}
			e := x.list[l.columns.forms[n]]
			if e.bits4 == 0 || e.network == "" {
				return errors.New("its address has no network")
			}
			g.Addresses = append(g.Addresses, e.address(offset(n)))
		}
	}
	if flags&colGateway != 0 {
		n, err := form()
		if err != nil {
			return err
		}
		g.Gateway4, g.Gateway6 = x.list[l.columns.forms[n]].gateway(offset(n))
	}
	if flags&colPorts != 0 {
		n, err := form()
		if err != nil {
			return err
		}
		g.HostPorts = append(g.HostPorts, x.list[l.columns.forms[n]].portList...)
	}
	l.s.side = x.appendFixed(l.s.side[:0], startAfter, extra, g)
	return nil
}

// status reads what was said of a task; nil if nothing.
func (k *cursor) status(flags uint32, row *taskRow) (*api.TaskReport, []byte, error) {
	c := k.c
	switch {
	case flags&colStatus == 0:
		return nil, nil, nil
	case flags&colRaw != 0:
		r := &api.TaskReport{}
		err := proto.Unmarshal(take(k, c.Statuses, &k.statuses), r)
		return r, nil, err
	}
	r := &api.TaskReport{State: uint32(row.state), Time: row.updated - take(k, c.StatusTimes, &k.times)}
	var container []byte
	for _, t := range []struct {
		flag uint32
		text *string
	}{{colMessage, &r.Message}, {colErr, &r.Err}, {colReason, &r.Reason}, {colContainerID, &r.ContainerId}} {
		if flags&t.flag == 0 {
			continue
		}
		n := take(k, c.Texts, &k.texts)
		if n < 0 || int(n) >= len(c.Text) {
			return nil, nil, errors.New("its text is not there")
		}
		*t.text = c.Text[n]
	}
	if flags&colContainer != 0 {
		if len(c.Containers) < k.containers+32 {
			return nil, nil, errShort
		}
		container = c.Containers[k.containers : k.containers+32]
		k.containers += 32
	}
	if flags&colPid != 0 {
		r.Pid = take(k, c.Pids, &k.pids)
	}
	if flags&colExit != 0 {
		r.ExitCode = take(k, c.Exits, &k.exits)
	}
	return r, container, nil
}
