package store

import (
	"math/bits"
	"slices"

	"skein/manager/api"
)

// A task is a row of fixed size without pointers, plus a few bytes aside for what varies: what it waits for, holds, and was said of it
// (see taskside.go). Rows live in pages; a snapshot takes the list of pages, and a page is copied when it is written for the first time
// after that. Services and nodes are numbers of this process's own; nothing here but the tasks themselves is replicated.

// rowID numbers rows from 1; 0 is none.
type rowID uint32

// pageRows is chosen so that copying a page costs a microsecond and an empty one wastes little.
const pageRows = 128

type taskRow struct {
	idHi, idLo       uint64
	slot             uint64
	version          uint64
	created, updated int64
	started          int64
	service, node    uint32 // numbers; node 0: none
	revision         uint32
	generation       uint32
	older            rowID  // in its slot
	onNode           uint32 // where it stands in its node's list
	side, sideLen    uint32 // in the page's arena
	desired          uint32
	state            uint16
	idTop            uint8
}

func (r *taskRow) id() api.ID { return api.ID{Top: r.idTop, Hi: r.idHi, Lo: r.idLo} }

func (r *taskRow) live() bool {
	s := api.TaskState(r.state)
	return r.node != 0 && s >= api.TaskAssigned && !s.Terminal()
}

type taskPage struct {
	arena   []byte
	garbage int
	epoch   uint64 // of the table when the page was made; older than the table's: a snapshot may be reading it
	used    [pageRows / 64]uint64
	n       int
	rows    [pageRows]taskRow
}

// taskTable holds all tasks. It is not safe for concurrent writing; reading changes nothing.
type taskTable struct {
	pages []*taskPage
	epoch uint64
	room  []uint64 // one bit per page: has a free row
	low   int      // no room in words before this one
	count int

	index taskIndex
	lists taskLists
	forms *formTable

	undo    []rowUndo
	gone    []rowID  // removed by the transaction under way
	compact []uint32 // pages with much garbage
}

// rowUndo takes back what was done to one row.
type rowUndo struct {
	id  rowID
	op  uint8
	old taskRow
}

const (
	rowCreated uint8 = iota
	rowChanged
	rowRemoved
)

func newTaskTable() *taskTable {
	return &taskTable{lists: newTaskLists(), forms: newFormTable()}
}

func (t *taskTable) row(id rowID) *taskRow {
	return &t.pages[(id-1)/pageRows].rows[(id-1)%pageRows]
}

func (t *taskTable) sideOf(id rowID) []byte {
	p := t.pages[(id-1)/pageRows]
	r := &p.rows[(id-1)%pageRows]
	return p.arena[r.side : r.side+r.sideLen]
}

// page is a page to write to.
func (t *taskTable) page(n uint32) *taskPage {
	p := t.pages[n]
	if p.epoch != t.epoch {
		c := *p // its arena is shared: what is behind its end is only ours
		c.epoch = t.epoch
		p = &c
		t.pages[n] = p
	}
	return p
}

// find returns the row of a task, 0 if there is none.
func (t *taskTable) find(id api.ID) rowID { return t.index.find(t, id) }

func (t *taskTable) findText(id string) rowID {
	v, ok := api.ParseID(id)
	if !ok {
		return 0
	}
	return t.find(v)
}

// mut is a row to change, except what names and places it in lists. Its former state comes back if the transaction is refused.
func (t *taskTable) mut(id rowID) *taskRow {
	p := t.page(uint32(id-1) / pageRows)
	r := &p.rows[(id-1)%pageRows]
	t.undo = append(t.undo, rowUndo{id: id, op: rowChanged, old: *r})
	return r
}

// create stores a new task, whose node, if it has one, is set afterwards with place.
func (t *taskTable) create(r taskRow, service string, node uint32) rowID {
	r.service = t.lists.service(service)
	id := t.freeRow()
	p := t.page(uint32(id-1) / pageRows)
	r.older, r.onNode, r.node = 0, 0, node
	p.rows[(id-1)%pageRows] = r
	t.link(id)
	t.undo = append(t.undo, rowUndo{id: id, op: rowCreated})
	return id
}

// place gives a task its node. The row was taken with mut.
func (t *taskTable) place(id rowID, node uint32) {
	r := t.row(id)
	if r.node == node {
		return
	}
	r.node = node
	r.onNode = t.lists.addToNode(node, id)
}

// remove takes a task out of everything; its row is free once the transaction is done.
func (t *taskTable) remove(id rowID) {
	t.undo = append(t.undo, rowUndo{id: id, op: rowRemoved})
	t.unlink(id)
	t.gone = append(t.gone, id)
}

func (t *taskTable) link(id rowID) {
	r := t.row(id)
	t.index.add(t, r.id(), id)
	t.lists.addToSlot(t, id)
	if r.node != 0 {
		r.onNode = t.lists.addToNode(r.node, id)
	}
	t.count++
}

func (t *taskTable) unlink(id rowID) {
	p := t.page(uint32(id-1) / pageRows)
	r := &p.rows[(id-1)%pageRows]
	t.index.del(t, r.id(), id)
	t.lists.delFromSlot(t, id)
	if r.node != 0 {
		t.delFromNode(r)
	}
	t.count--
}

// delFromNode fills the gap in the node's list with its last task.
func (t *taskTable) delFromNode(r *taskRow) {
	if moved := t.lists.delFromNode(r.node, r.onNode); moved != 0 {
		p := t.page(uint32(moved-1) / pageRows)
		p.rows[(moved-1)%pageRows].onNode = r.onNode
	}
}

// freeRow takes the lowest free row, so that pages at the end become empty.
func (t *taskTable) freeRow() rowID {
	for ; t.low < len(t.room); t.low++ {
		w, word := t.low, t.room[t.low]
		if word == 0 {
			continue
		}
		n := w*64 + bits.TrailingZeros64(word)
		if t.pages[n] == nil {
			t.pages[n] = &taskPage{epoch: t.epoch}
		}
		p := t.page(uint32(n))
		for i, used := range p.used {
			if free := ^used; free != 0 {
				k := i*64 + bits.TrailingZeros64(free)
				p.used[i] |= free & -free
				if p.n++; p.n == pageRows {
					t.room[w] &^= 1 << (n % 64)
				}
				return rowID(n*pageRows + k + 1)
			}
		}
	}
	n := len(t.pages)
	t.pages = append(t.pages, nil)
	if n/64 == len(t.room) {
		t.room = append(t.room, 0)
	}
	t.room[n/64] |= 1 << (n % 64)
	t.low = min(t.low, n/64)
	return t.freeRow()
}

func (t *taskTable) giveRow(id rowID) {
	n, k := uint32(id-1)/pageRows, (id-1)%pageRows
	p := t.page(n)
	p.used[k/64] &^= 1 << (k % 64)
	p.garbage += int(p.rows[k].sideLen)
	p.rows[k] = taskRow{}
	t.room[n/64] |= 1 << (n % 64)
	t.low = min(t.low, int(n/64))
	if p.n--; p.n == 0 {
		t.pages[n] = nil
	}
}

// setSide replaces what is kept aside of a row that was taken with mut or made just now.
func (t *taskTable) setSide(id rowID, b []byte) {
	n := uint32(id-1) / pageRows
	p := t.page(n)
	r := &p.rows[(id-1)%pageRows]
	p.garbage += int(r.sideLen)
	if len(b) == 0 {
		r.side, r.sideLen = 0, 0
		return
	}
	if need := len(p.arena) + len(b); need > cap(p.arena) {
		p.arena = append(make([]byte, 0, need+need/8+64), p.arena...)
	}
	r.side, r.sideLen = uint32(len(p.arena)), uint32(len(b))
	p.arena = append(p.arena, b...)
	if p.garbage > 512 && p.garbage > len(p.arena)/4 && !slices.Contains(t.compact[max(0, len(t.compact)-8):], n) {
		t.compact = append(t.compact, n)
	}
}

// rollback takes back everything since the last settle.
func (t *taskTable) rollback() {
	t.gone = t.gone[:0]
	for i := len(t.undo) - 1; i >= 0; i-- {
		u := &t.undo[i]
		switch u.op {
		case rowCreated:
			t.unlink(u.id)
			t.giveRow(u.id)
		case rowRemoved:
			t.link(u.id)
		case rowChanged:
			p := t.page(uint32(u.id-1) / pageRows)
			r := &p.rows[(u.id-1)%pageRows]
			if r.node != u.old.node {
				t.delFromNode(r)
			}
			at, older := r.onNode, r.older // lists may have moved it meanwhile
			p.garbage += int(r.sideLen) - int(u.old.sideLen)
			*r = u.old
			r.older = older
			if r.node != 0 {
				r.onNode = at
			}
		}
	}
	t.undo = t.undo[:0]
	t.lists.settle()
}

// settle ends a transaction: nothing is taken back any more.
func (t *taskTable) settle() {
	t.undo = t.undo[:0]
	for _, id := range t.gone {
		t.giveRow(id)
	}
	t.gone = t.gone[:0]
	for _, n := range t.compact {
		t.tidy(n)
	}
	t.compact = t.compact[:0]
	t.lists.settle()
	if t.forms.full() {
		t.sweepForms()
	}
}

// tidy writes a page's arena anew, without what no row refers to.
func (t *taskTable) tidy(n uint32) {
	if t.pages[n] == nil {
		return
	}
	p := t.page(n)
	size := 0
	for i := range p.rows {
		size += int(p.rows[i].sideLen)
	}
	arena := make([]byte, 0, size+size/8+64)
	for i := range p.rows {
		if r := &p.rows[i]; r.sideLen > 0 {
			b := p.arena[r.side : r.side+r.sideLen]
			r.side = uint32(len(arena))
			arena = append(arena, b...)
		}
	}
	p.arena, p.garbage = arena, 0
}

// each calls f for every row, in no useful order.
func (t *taskTable) each(f func(id rowID, p *taskPage, r *taskRow)) {
	eachRow(t.pages, f)
}

func eachRow(pages []*taskPage, f func(id rowID, p *taskPage, r *taskRow)) {
	for n, p := range pages {
		if p == nil {
			continue
		}
		for w, word := range p.used {
			for ; word != 0; word &= word - 1 {
				k := w*64 + bits.TrailingZeros64(word)
				f(rowID(n*pageRows+k+1), p, &p.rows[k])
			}
		}
	}
}

// freeze returns a copy to read from while this one goes on: pages are shared until they are written to.
func (t *taskTable) freeze() *taskTable {
	t.epoch++
	f := &taskTable{pages: slices.Clone(t.pages), count: t.count, forms: &formTable{list: slices.Clone(t.forms.list)}}
	f.lists.services.id, f.lists.nodes.id = slices.Clone(t.lists.services.id), slices.Clone(t.lists.nodes.id)
	return f
}

// sorted lists all rows in order of their ids, without the index.
func (t *taskTable) sorted() []rowID {
	out := make([]rowID, 0, t.count)
	t.each(func(id rowID, _ *taskPage, _ *taskRow) { out = append(out, id) })
	slices.SortFunc(out, func(a, b rowID) int { return t.row(a).id().Compare(t.row(b).id()) })
	return out
}
