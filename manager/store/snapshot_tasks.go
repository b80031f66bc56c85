package store

import (
	"cmp"
	"slices"
	"strings"

	"skein/manager/api"
)

// columnRows is how many tasks a chunk of columns has; less than half a MiB.
const columnRows = 8192

// Flags of a task in a snapshot's columns. They are part of the format: never change one.
const (
	colStarted = 1 << iota
	colStartAfter
	colAddresses
	colGateway
	colPorts
	colStatus
	colRaw
	colExtra
	colByNode
	colMessage
	colErr
	colReason
	colContainer
	colContainerID
	colPid
	colExit
)

// columnWriter writes tasks as columns.
type columnWriter struct {
	t        *taskTable
	put      func(*api.SnapshotChunk)
	services []uint32 // by this process's number: that in the snapshot
	nodes    []uint32
	forms    []uint32
	offsets  map[uint32]int64 // the last by form

	c       *api.TaskColumns
	last    taskRow
	entries map[[2]uint64]uint32
	entry   [2]uint64
	texts   map[string]uint32
	status  api.TaskReport
	hexed   []byte
}

// writeTasks writes all tasks. What is equal is written equally: numbers of this process do not show.
func (t *taskTable) writeTasks(put func(*api.SnapshotChunk)) {
	w := &columnWriter{t: t, put: put, offsets: map[uint32]int64{}}
	order := t.canonical()
	w.names(order)
	for _, ids := range order {
		for _, id := range ids {
			if w.c == nil {
				w.begin()
			}
			w.add(id)
			if w.c.Count == columnRows {
				w.flush()
			}
		}
	}
	w.flush()
}

// canonical lists all tasks by service, slot or node, and generation.
func (t *taskTable) canonical() [][]rowID {
	of := make([][]rowID, len(t.lists.services.id))
	t.each(func(id rowID, _ *taskPage, r *taskRow) { of[r.service] = append(of[r.service], id) })
	for _, ids := range of {
		slices.SortFunc(ids, func(a, b rowID) int {
			x, y := t.row(a), t.row(b)
			if c := cmp.Compare(x.slot, y.slot); c != 0 {
				return c
			}
			if x.slot == 0 && x.node != y.node {
				return strings.Compare(t.lists.nodes.id[x.node], t.lists.nodes.id[y.node])
			}
			return cmp.Compare(x.generation, y.generation)
		})
	}
	slices.SortFunc(of, func(a, b []rowID) int {
		if len(a) == 0 || len(b) == 0 {
			return cmp.Compare(len(a), len(b))
		}
		return strings.Compare(t.lists.services.id[t.row(a[0]).service], t.lists.services.id[t.row(b[0]).service])
	})
	return of
}

// names writes the names that tasks have, numbered anew.
func (w *columnWriter) names(order [][]rowID) {
	t := w.t
	used := make([]bool, len(t.lists.nodes.id))
	serves := make([]bool, len(t.lists.services.id))
	w.forms = make([]uint32, len(t.forms.list))
	names := &api.TaskNames{}
	for _, ids := range order {
		for _, id := range ids {
			r := t.row(id)
			used[r.node], serves[r.service] = true, true
			readSide(t.sideOf(id)).forms(func(n uint32) {
				if w.forms[n] == 0 {
					names.Forms = append(names.Forms, formRecord(t.forms.list[n]))
					w.forms[n] = uint32(len(names.Forms))
				}
			})
		}
	}
	used[0], serves[0] = false, false
	w.services, names.Services = numbered(t.lists.services.id, serves)
	w.nodes, names.Nodes = numbered(t.lists.nodes.id, used)
	if len(names.Services) > 0 {
		w.put(&api.SnapshotChunk{Kind: &api.SnapshotChunk_TaskNames{TaskNames: names}})
	}
}

// numbered sorts the used ones of ids and says where each went.
func numbered(ids []string, used []bool) (to []uint32, sorted []string) {
	to = make([]uint32, len(ids))
	var list []uint32
	for n := range ids {
		if used[n] {
			list = append(list, uint32(n))
		}
	}
	slices.SortFunc(list, func(a, b uint32) int { return strings.Compare(ids[a], ids[b]) })
	for i, n := range list {
		to[n] = uint32(i)
		sorted = append(sorted, ids[n])
	}
	return to, sorted
}

func formRecord(e *formEntry) *api.AddressForm {
	r := &api.AddressForm{NetworkId: e.network, Bits4: uint32(e.bits4), Bits6: uint32(e.bits6), Aliases: e.aliasList, Ports: e.portList}
	if e.bits4 > 0 {
		r.Base4 = e.base4[:]
	}
	if e.has6 {
		r.Base6 = e.base6[:]
	}
	return r
}

func (w *columnWriter) begin() {
	w.c = &api.TaskColumns{}
	w.last, w.entry = taskRow{}, [2]uint64{}
	w.entries, w.texts = map[[2]uint64]uint32{}, map[string]uint32{}
}

func (w *columnWriter) flush() {
	if c := w.c; c != nil {
		for _, list := range runColumns(c) {
			*list = inRuns(*list)
		}
		w.put(&api.SnapshotChunk{Kind: &api.SnapshotChunk_TaskColumns{TaskColumns: w.c}})
	}
	w.c = nil
}

func (w *columnWriter) add(id rowID) {
	c, r, last := w.c, w.t.row(id), &w.last
	if n := len(c.Services); n > 0 && c.Services[n-2] == w.services[r.service] {
		c.Services[n-1]++
	} else {
		c.Services = append(c.Services, w.services[r.service], 1)
	}
	c.Count++
	c.Slots = append(c.Slots, int64(r.slot-last.slot))
	c.Generations = append(c.Generations, int64(r.generation)-int64(last.generation))
	c.Revisions = append(c.Revisions, int64(r.revision)-int64(last.revision))
	node := uint32(0)
	if r.node != 0 {
		node = w.nodes[r.node] + 1
	}
	c.Nodes = append(c.Nodes, node)
	c.States = append(c.States, int64(r.state)-int64(last.state))
	c.Desired = append(c.Desired, int64(r.desired)-int64(last.desired))
	c.Entries = append(c.Entries, w.entryOf(r))
	c.Created = append(c.Created, r.created-last.created)
	flags := uint32(0)
	if r.started != 0 {
		flags |= colStarted
		c.Started = append(c.Started, r.updated-r.started)
	}
	d := readSide(w.t.sideOf(id))
	flags |= w.held(&d, r)
	flags |= w.said(d, r)
	c.Flags = append(c.Flags, int64(flags))
	w.last = *r
}

func (w *columnWriter) entryOf(r *taskRow) uint32 {
	e := [2]uint64{r.version, uint64(r.updated)}
	n, ok := w.entries[e]
	if !ok {
		n = uint32(len(w.entries))
		w.entries[e] = n
		w.c.EntryVersions = append(w.c.EntryVersions, int64(e[0]-w.entry[0]))
		w.c.EntryTimes = append(w.c.EntryTimes, int64(e[1]-w.entry[1]))
		w.entry = e
	}
	return n
}

// held writes what a task waits for and holds.
func (w *columnWriter) held(d *side, r *taskRow) (flags uint32) {
	c := w.c
	if d.flags&sideStartAfter != 0 {
		flags |= colStartAfter
		c.StartAfter = append(c.StartAfter, d.startAfter-r.created)
	}
	offset := func(form, off uint32) {
		n := w.forms[form]
		c.Forms = append(c.Forms, n-1)
		c.Offsets = append(c.Offsets, int64(off)-w.offsets[n])
		w.offsets[n] = int64(off)
	}
	if n := d.eachAddress(offset); n > 0 {
		flags |= colAddresses
		c.Addresses = append(c.Addresses, uint32(n))
	}
	if d.flags&sideGateway != 0 {
		flags |= colGateway
		offset(d.gateway, d.gatewayOff)
	}
	if d.flags&sidePorts != 0 {
		flags |= colPorts
		c.Forms = append(c.Forms, w.forms[d.ports]-1)
	}
	if len(d.extra) > 0 {
		flags |= colExtra
		c.Extras = append(c.Extras, d.extra)
	}
	return flags
}

// said writes what was said of a task.
func (w *columnWriter) said(d side, r *taskRow) (flags uint32) {
	c := w.c
	if d.flags&sideStatus == 0 {
		return 0
	}
	flags = colStatus
	if d.flags&sideRaw != 0 {
		c.Statuses = append(c.Statuses, d.status)
		return flags | colRaw
	}
	s := &w.status
	s.NodeId, s.Message, s.Err, s.Reason, s.ContainerId, s.Pid, s.ExitCode = "", "", "", "", "", 0, 0
	w.hexed = nil
	_ = readStatus(s, d, r, "", ".", func(hexed, plain []byte) string { // does not fail: it is no message
		if len(hexed) > 0 {
			w.hexed = hexed
			return ""
		}
		return string(plain)
	})
	c.StatusTimes = append(c.StatusTimes, r.updated-s.Time)
	if s.NodeId != "" {
		flags |= colByNode
	}
	for _, t := range []struct {
		text string
		flag uint32
	}{{s.Message, colMessage}, {s.Err, colErr}, {s.Reason, colReason}, {s.ContainerId, colContainerID}} {
		if t.text != "" {
			flags |= t.flag
			c.Texts = append(c.Texts, int64(w.text(t.text)))
		}
	}
	if w.hexed != nil {
		flags |= colContainer
		c.Containers = append(c.Containers, w.hexed...)
	}
	if s.Pid != 0 {
		flags |= colPid
		c.Pids = append(c.Pids, s.Pid)
	}
	if s.ExitCode != 0 {
		flags |= colExit
		c.Exits = append(c.Exits, s.ExitCode)
	}
	return flags
}

func (w *columnWriter) text(s string) uint32 {
	n, ok := w.texts[s]
	if !ok {
		n = uint32(len(w.texts))
		w.texts[s] = n
		w.c.Text = append(w.c.Text, s)
	}
	return n
}

// runColumns are those columns that are written in runs.
func runColumns(c *api.TaskColumns) []*[]int64 {
	return []*[]int64{&c.Slots, &c.Generations, &c.Revisions, &c.States, &c.Desired, &c.Created, &c.Flags, &c.Started, &c.Texts}
}

// inRuns gives each value once, followed by how often it comes.
func inRuns(list []int64) []int64 {
	var out []int64
	for i, v := range list {
		if i > 0 && out[len(out)-2] == v {
			out[len(out)-1]++
		} else {
			out = append(out, v, 1)
		}
	}
	return out
}

// outOfRuns undoes it; false if that gives more than so many values.
func outOfRuns(list []int64, most int) ([]int64, bool) {
	if len(list)%2 != 0 {
		return nil, false
	}
	out := make([]int64, 0, len(list))
	for i := 0; i < len(list); i += 2 {
		if list[i+1] < 0 || list[i+1] > int64(most-len(out)) {
			return nil, false
		}
		for range list[i+1] {
			out = append(out, list[i])
		}
	}
	return out, true
}
