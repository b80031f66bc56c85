package store

import (
	"slices"

	"skein/manager/api"
)

// taskIndex finds rows by task id, also by the beginning of one. Ids are hashes, so their rank says where an id stands among all: each
// shard is a table with linear probing whose places follow the order of ids. An entry is the next 32 bits of the rank and the row.
type taskIndex struct {
	shards [indexShards]indexShard
}

const indexShards = 256

type indexShard struct {
	slots []uint64
	n     int
}

// Bounds of how full a shard gets, and how much of it is behind the last home, for what collides there.
const (
	shardMin  = 8
	shardTail = 8
)

func rankParts(rank uint64) (shard uint64, tag uint32) { return rank >> 56, uint32(rank >> 24) }

// homes is the number of places that are homes.
func (s *indexShard) homes() uint64 { return uint64(len(s.slots) - shardTail) }

func (s *indexShard) home(tag uint32) int {
	return int(uint64(tag) * s.homes() >> 32)
}

func (x *taskIndex) find(t *taskTable, id api.ID) rowID {
	at, tag := rankParts(id.Rank())
	s := &x.shards[at]
	if s.n == 0 {
		return 0
	}
	for i := s.home(tag); i < len(s.slots) && s.slots[i] != 0; i++ {
		if uint32(s.slots[i]>>32) == tag {
			if row := rowID(s.slots[i]); t.row(row).id() == id {
				return row
			}
		}
	}
	return 0
}

func (x *taskIndex) add(_ *taskTable, id api.ID, row rowID) {
	at, tag := rankParts(id.Rank())
	s := &x.shards[at]
	if s.n++; s.slots == nil || uint64(s.n)*5 > s.homes()*4 {
		s.grow()
	}
	for !s.put(uint64(tag)<<32 | uint64(row)) {
		s.grow()
	}
}

// put stores an entry, unless it would run over the end.
func (s *indexShard) put(e uint64) bool {
	for i := s.home(uint32(e >> 32)); i < len(s.slots); i++ {
		if s.slots[i] == 0 {
			s.slots[i] = e
			return true
		}
	}
	return false
}

func (s *indexShard) grow() {
	old := s.slots
	size := shardMin
	if old != nil {
		size = int(s.homes()) * 4 / 3
	}
again:
	for {
		s.slots = make([]uint64, max(size, shardMin)+shardTail)
		for _, e := range old {
			if e != 0 && !s.put(e) {
				size = size * 4 / 3
				continue again
			}
		}
		return
	}
}

func (x *taskIndex) del(t *taskTable, id api.ID, row rowID) {
	at, tag := rankParts(id.Rank())
	s := &x.shards[at]
	i := s.home(tag)
	for s.slots[i] != uint64(tag)<<32|uint64(row) {
		i++
	}
	for j := i + 1; j < len(s.slots) && s.slots[j] != 0; j++ { // close the gap
		if s.home(uint32(s.slots[j]>>32)) <= i {
			s.slots[i] = s.slots[j]
			i = j
		}
	}
	s.slots[i] = 0
	if s.n--; s.n*4 < int(s.homes()) && len(s.slots) > shardMin+shardTail {
		s.shrink()
	}
}

func (s *indexShard) shrink() {
	if s.n == 0 {
		s.slots = nil
		return
	}
	old := *s
	s.slots = make([]uint64, max(int(s.homes())/2, shardMin)+shardTail)
	for _, e := range old.slots {
		if e != 0 && !s.put(e) {
			*s = old
			return
		}
	}
}

// between calls f for the rows of all tasks whose ids are from lo to hi, in order of their ids, until it returns false.
func (x *taskIndex) between(t *taskTable, lo, hi api.ID, f func(rowID) bool) {
	first, lowTag := rankParts(lo.Rank())
	last, _ := rankParts(hi.Rank())
	var run []rowID
	for at := first; at <= last; at++ {
		s := &x.shards[at]
		if s.n == 0 {
			continue
		}
		begin := 0
		if at == first {
			begin = s.home(lowTag)
		}
		for i := begin; i <= len(s.slots); i++ {
			if i < len(s.slots) && s.slots[i] != 0 {
				run = append(run, rowID(s.slots[i]))
				continue
			}
			// What stands together is in order with what is elsewhere, but not in itself.
			slices.SortFunc(run, func(a, b rowID) int { return t.row(a).id().Compare(t.row(b).id()) })
			for _, row := range run {
				id := t.row(row).id()
				if id.Compare(lo) < 0 {
					continue
				}
				if id.Compare(hi) > 0 || !f(row) {
					return
				}
			}
			run = run[:0]
		}
	}
}

// prefixRange gives the lowest and the highest id that begin so.
func prefixRange(prefix string) (lo, hi api.ID, ok bool) {
	const none, all = "0000000000000000000000000", "zzzzzzzzzzzzzzzzzzzzzzzzz"
	if prefix == "" || len(prefix) > len(none) {
		return lo, hi, false
	}
	lo, ok = api.ParseID(prefix + none[len(prefix):])
	hi, _ = api.ParseID(prefix + all[len(prefix):])
	return lo, hi, ok
}

// byID lists at most so many tasks whose ids begin so, or are between the two beginnings, in order of their ids.
func (t *taskTable) byID(from, to string, most int) []rowID {
	lo, _, ok := prefixRange(from)
	_, hi, ok2 := prefixRange(to)
	if !ok || !ok2 {
		return nil
	}
	var out []rowID
	t.index.between(t, lo, hi, func(id rowID) bool {
		out = append(out, id)
		return len(out) < most
	})
	return out
}
