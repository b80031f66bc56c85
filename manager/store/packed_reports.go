package store

import (
	"encoding/binary"

	"skein/manager/api"
)

// idBytes is the length of a task's id in a packed change.
const idBytes = 17

func appendID(b []byte, id api.ID) []byte {
	b = append(b, id.Top)
	b = binary.BigEndian.AppendUint64(b, id.Hi)
	return binary.BigEndian.AppendUint64(b, id.Lo)
}

func idAt(b []byte) api.ID {
	return api.ID{Top: b[0], Hi: binary.BigEndian.Uint64(b[1:]), Lo: binary.BigEndian.Uint64(b[9:])}
}

// reportColumns reads packed reports one by one. Columns have one value for each report, or one for all, or none.
type reportColumns struct {
	p          *api.PackedReports
	n          int
	containers []byte
	bare       []uint32
	time       int64
	node       uint32
	report     api.TaskReport // used again and again
}

func newReportColumns(p *api.PackedReports) (*reportColumns, error) {
	n := len(p.Ids) / idBytes
	whole := func(k int) bool { return k == n || k <= 1 }
	with := n - len(p.Bare)
	switch {
	case len(p.Ids)%idBytes != 0 || !whole(len(p.Nodes)) || !whole(len(p.States)) || !whole(len(p.Messages)) || !whole(len(p.Errs)) ||
		len(p.Times) != n || !whole(len(p.Pids)) || !whole(len(p.Exits)) || with < 0 || len(p.Containers) != 32*with:
		return nil, api.Errorf(errInvalid, "packed reports: columns of different lengths")
	}
	for _, list := range [][]uint32{p.Messages, p.Errs} {
		for _, k := range list {
			if int(k) > len(p.Texts) {
				return nil, api.Errorf(errInvalid, "packed reports: text %d of %d", k, len(p.Texts))
			}
		}
	}
	return &reportColumns{p: p, n: n, containers: p.Containers, bare: p.Bare}, nil
}

func column[T any](list []T, i int) (v T) {
	switch {
	case len(list) == 1:
		v = list[0]
	case len(list) > 1:
		v = list[i]
	}
	return v
}

// text is 0 for none.
func (c *reportColumns) text(k uint32) string {
	if k == 0 {
		return ""
	}
	return c.p.Texts[k-1]
}

// next reads report i; they are read in order. The report is valid until the next call, its container's id is apart.
func (c *reportColumns) next(i int) (id api.ID, r *api.TaskReport, container []byte) {
	p := c.p
	id = idAt(p.Ids[i*idBytes:])
	c.time += p.Times[i]
	c.node = column(p.Nodes, i)
	r = &c.report
	r.State, r.Time, r.Message, r.Err = column(p.States, i), c.time, c.text(column(p.Messages, i)), c.text(column(p.Errs, i))
	r.Pid, r.ExitCode, r.Reason = column(p.Pids, i), column(p.Exits, i), ""
	if len(c.bare) > 0 && int(c.bare[0]) == i {
		c.bare = c.bare[1:]
	} else if len(c.containers) >= 32 {
		container, c.containers = c.containers[:32], c.containers[32:]
	}
	return id, r, container
}

// reportPacker gathers reports.
type reportPacker struct {
	p     *api.PackedReports
	texts map[string]uint32
	last  int64
}

// maxPacked bounds the reports of one packed change.
const maxPacked = 1000

func newReportPacker() *reportPacker {
	return &reportPacker{p: &api.PackedReports{}, texts: map[string]uint32{"": 0}}
}

func (k *reportPacker) text(s string) uint32 {
	if n, ok := k.texts[s]; ok {
		return n
	}
	k.p.Texts = append(k.p.Texts, s)
	k.texts[s] = uint32(len(k.p.Texts))
	return uint32(len(k.p.Texts))
}

// add takes a report, if it is one that has a place in every column.
func (k *reportPacker) add(r *api.TaskReport, node uint32) bool {
	var container [32]byte
	id, ok := api.ParseID(r.TaskId)
	named := unhex(&container, r.ContainerId)
	if !ok || node == 0 || len(r.Ports) > 0 || r.Reason != "" || (r.ContainerId != "" && !named) || len(r.ProtoReflect().GetUnknown()) > 0 {
		return false
	}
	p := k.p
	if !named {
		p.Bare = append(p.Bare, uint32(len(p.Times)))
	} else {
		p.Containers = append(p.Containers, container[:]...)
	}
	p.Ids = appendID(p.Ids, id)
	p.Times = append(p.Times, r.Time-k.last)
	k.last = r.Time
	p.Nodes, p.States = append(p.Nodes, node), append(p.States, r.State)
	p.Messages, p.Errs = append(p.Messages, k.text(r.Message)), append(p.Errs, k.text(r.Err))
	p.Pids, p.Exits = append(p.Pids, r.Pid), append(p.Exits, r.ExitCode)
	return true
}

// change ends the gathering.
func (k *reportPacker) change() *api.Change {
	p := k.p
	p.Nodes, p.States, p.Messages, p.Errs = same(p.Nodes), same(p.States), same(p.Messages), same(p.Errs)
	p.Pids, p.Exits = same(p.Pids), same(p.Exits)
	return &api.Change{Kind: &api.Change_PackedReports{PackedReports: p}}
}

// same leaves of a column whose values are all the same only one, of a column of zeros nothing.
func same[T comparable](list []T) []T {
	for _, v := range list {
		if v != list[0] {
			return list
		}
	}
	if list[0] == *new(T) {
		return nil
	}
	return list[:1]
}
