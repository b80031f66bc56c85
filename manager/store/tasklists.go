package store

import (
	"cmp"
	"maps"
	"math"
	"slices"
	"strings"
)

// taskLists say which tasks a service, one of its slots, and a node have. Services and nodes get numbers while tasks name them, also
// after they were removed themselves.
type taskLists struct {
	services names[serviceTasks]
	nodes    names[nodeTasks]
}

// names gives texts numbers, from 1, with a value each.
type names[V any] struct {
	number map[string]uint32
	id     []string // by number
	val    []V
	free   []uint32
	empty  []uint32 // may have become unused in the transaction under way
}

// serviceTasks are the tasks of a service, by slot: the newest of each, from which rows lead to the older ones.
type serviceTasks struct {
	n      int
	heads  []slotHead       // by slot
	far    map[uint64]rowID // slots beyond 32 bits
	byNode []slotHead       // of global services: slot is the node's number, sorted by the node's id
	revs   []revisionUse
}

type slotHead struct {
	slot uint32
	row  rowID
}

type revisionUse struct{ number, tasks uint32 }

type nodeTasks struct {
	rows []rowID
}

func newTaskLists() taskLists {
	return taskLists{services: newNames[serviceTasks](), nodes: newNames[nodeTasks]()}
}

func newNames[V any]() names[V] {
	return names[V]{number: map[string]uint32{}, id: []string{""}, val: make([]V, 1)}
}

// of gives a text its number.
func (x *names[V]) of(id string) uint32 {
	if n := x.number[id]; n != 0 {
		return n
	}
	var n uint32
	if k := len(x.free); k > 0 {
		n, x.free = x.free[k-1], x.free[:k-1]
		x.id[n] = id
	} else {
		n = uint32(len(x.id))
		x.id = append(x.id, id)
		x.val = append(x.val, *new(V))
	}
	x.number[id] = n
	x.empty = append(x.empty, n)
	return n
}

// drop frees the numbers that are unused.
func (x *names[V]) drop(unused func(*V) bool) {
	for _, n := range x.empty {
		if id := x.id[n]; id != "" && unused(&x.val[n]) {
			delete(x.number, id)
			x.id[n], x.val[n] = "", *new(V)
			x.free = append(x.free, n)
		}
	}
	x.empty = x.empty[:0]
}

func (l *taskLists) service(id string) uint32 { return l.services.of(id) }

func (l *taskLists) node(id string) uint32 {
	if id == "" {
		return 0
	}
	return l.nodes.of(id)
}

// settle forgets services and nodes without tasks.
func (l *taskLists) settle() {
	l.services.drop(func(v *serviceTasks) bool { return v.n == 0 })
	l.nodes.drop(func(v *nodeTasks) bool { return len(v.rows) == 0 })
}

func (l *taskLists) addToNode(node uint32, id rowID) (at uint32) {
	v := &l.nodes.val[node]
	v.rows = append(v.rows, id)
	return uint32(len(v.rows) - 1)
}

// delFromNode takes out what stands at a place and returns the row that took it.
func (l *taskLists) delFromNode(node, at uint32) (moved rowID) {
	v := &l.nodes.val[node]
	last := len(v.rows) - 1
	if int(at) != last {
		moved = v.rows[last]
		v.rows[at] = moved
	}
	if v.rows = v.rows[:last]; last == 0 {
		v.rows = nil
		l.nodes.empty = append(l.nodes.empty, node)
	}
	return moved
}

// head finds a slot's place in its list.
func (l *taskLists) head(v *serviceTasks, slot uint64, node uint32) (list *[]slotHead, at int, found bool) {
	if slot == 0 {
		at, found = slices.BinarySearchFunc(v.byNode, node, func(h slotHead, n uint32) int {
			if h.slot == n {
				return 0
			}
			return strings.Compare(l.nodes.id[h.slot], l.nodes.id[n])
		})
		return &v.byNode, at, found
	}
	if k := slot - 1; k < uint64(len(v.heads)) && uint64(v.heads[k].slot) == slot {
		return &v.heads, int(k), true
	}
	if k := len(v.heads); k == 0 || uint64(v.heads[k-1].slot) < slot {
		return &v.heads, k, false
	}
	at, found = slices.BinarySearchFunc(v.heads, slot, func(h slotHead, s uint64) int { return cmp.Compare(uint64(h.slot), s) })
	return &v.heads, at, found
}

// newest is the newest task of a slot, 0 if it has none.
func (l *taskLists) newest(service string, slot uint64, node string) rowID {
	n := l.services.number[service]
	if n == 0 {
		return 0
	}
	v := &l.services.val[n]
	if slot > math.MaxUint32 {
		return v.far[slot]
	}
	k := uint32(0)
	if slot == 0 {
		if k = l.nodes.number[node]; k == 0 {
			return 0
		}
	}
	if list, at, found := l.head(v, slot, k); found {
		return (*list)[at].row
	}
	return 0
}

func (l *taskLists) addToSlot(t *taskTable, id rowID) {
	r := t.row(id)
	v := &l.services.val[r.service]
	v.n++
	v.use(r.revision)
	if r.slot > math.MaxUint32 {
		if v.far == nil {
			v.far = map[uint64]rowID{}
		}
		v.far[r.slot] = chainIn(t, v.far[r.slot], id)
		return
	}
	list, at, found := l.head(v, r.slot, r.node)
	if found {
		(*list)[at].row = chainIn(t, (*list)[at].row, id)
		return
	}
	h := slotHead{uint32(r.slot), id}
	if r.slot == 0 {
		h.slot = r.node
	}
	*list = slices.Insert(*list, at, h)
}

// chainIn puts a task into its slot's chain, newest first, and returns the chain's first.
func chainIn(t *taskTable, head, id rowID) rowID {
	gen := t.row(id).generation
	before, after := rowID(0), head
	for after != 0 && t.row(after).generation > gen {
		before, after = after, t.row(after).older
	}
	t.setOlder(id, after)
	if before == 0 {
		return id
	}
	t.setOlder(before, id)
	return head
}

func chainOut(t *taskTable, head, id rowID) rowID {
	next := t.row(id).older
	if head == id {
		return next
	}
	for at := head; at != 0; at = t.row(at).older {
		if t.row(at).older == id {
			t.setOlder(at, next)
			break
		}
	}
	return head
}

func (t *taskTable) setOlder(id, older rowID) {
	if t.row(id).older != older {
		t.page(uint32(id-1) / pageRows).rows[(id-1)%pageRows].older = older
	}
}

func (l *taskLists) delFromSlot(t *taskTable, id rowID) {
	r := t.row(id)
	v := &l.services.val[r.service]
	if v.n--; v.n == 0 {
		l.services.empty = append(l.services.empty, r.service)
	}
	v.unuse(r.revision)
	if r.slot > math.MaxUint32 {
		if v.far[r.slot] = chainOut(t, v.far[r.slot], id); v.far[r.slot] == 0 {
			delete(v.far, r.slot)
		}
		return
	}
	list, at, _ := l.head(v, r.slot, r.node)
	if head := chainOut(t, (*list)[at].row, id); head != 0 {
		(*list)[at].row = head
	} else if *list = slices.Delete(*list, at, at+1); len(*list) == 0 {
		*list = nil
	}
}

// use counts the tasks of each revision; a service has few.
func (v *serviceTasks) use(rev uint32) {
	for i := range v.revs {
		if v.revs[i].number == rev {
			v.revs[i].tasks++
			return
		}
	}
	v.revs = append(v.revs, revisionUse{rev, 1})
}

func (v *serviceTasks) unuse(rev uint32) {
	for i := range v.revs {
		if v.revs[i].number != rev {
			continue
		}
		if v.revs[i].tasks--; v.revs[i].tasks == 0 {
			v.revs = slices.Delete(v.revs, i, i+1)
		}
		return
	}
}

// hasTasks reports whether there are tasks of a service.
func (l *taskLists) hasTasks(service string) bool {
	n := l.services.number[service]
	return n != 0 && l.services.val[n].n > 0
}

// used is the number of tasks of a revision.
func (l *taskLists) used(service string, rev uint64) int {
	if n := l.services.number[service]; n != 0 {
		for _, u := range l.services.val[n].revs {
			if uint64(u.number) == rev {
				return int(u.tasks)
			}
		}
	}
	return 0
}

// ofService calls f for a service's tasks by slot (or node id) and generation until it returns false.
func (t *taskTable) ofService(service string, f func(rowID) bool) {
	n := t.lists.services.number[service]
	if n == 0 {
		return
	}
	v := &t.lists.services.val[n]
	for _, list := range [][]slotHead{v.byNode, v.heads} {
		for _, h := range list {
			if !t.chain(h.row, f) {
				return
			}
		}
	}
	for _, slot := range slices.Sorted(maps.Keys(v.far)) {
		if !t.chain(v.far[slot], f) {
			return
		}
	}
}

// chain calls f for the tasks of a slot, oldest first.
func (t *taskTable) chain(head rowID, f func(rowID) bool) bool {
	if head == 0 {
		return true
	}
	if t.row(head).older == 0 {
		return f(head)
	}
	var room [8]rowID
	all := room[:0]
	for ; head != 0; head = t.row(head).older {
		all = append(all, head)
	}
	for _, id := range slices.Backward(all) {
		if !f(id) {
			return false
		}
	}
	return true
}

// ofNode lists a node's tasks in order of their ids.
func (t *taskTable) ofNode(node string) []rowID {
	n := t.lists.nodes.number[node]
	if n == 0 {
		return nil
	}
	out := slices.Clone(t.lists.nodes.val[n].rows)
	slices.SortFunc(out, func(a, b rowID) int { return t.row(a).id().Compare(t.row(b).id()) })
	return out
}
