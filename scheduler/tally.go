package scheduler

// tally counts by node: an open hash table while few nodes have a count, a plain array from a quarter of the nodes on. It is read millions
// of times a second, and each gives the same order for the same calls, as a map would not.
type tally struct {
	keys  []int32 // number of the node plus one, 0 where free; a power of two long
	vals  []int32
	used  int     // keys that are set, also those whose count went back to 0
	nodes int     // nodes with a count above 0
	dense []int32 // by number, instead of keys and vals
}

func (t *tally) get(i int32) int32 {
	if t.dense != nil {
		if int(i) < len(t.dense) {
			return t.dense[i]
		}
		return 0
	}
	if t.used == 0 {
		return 0
	}
	return t.vals[t.find(i)]
}

// find is the place of a node's key, or the free one where it belongs.
func (t *tally) find(i int32) int {
	mask := uint32(len(t.keys) - 1)
	h := uint32(i+1) * 0x9e3779b1
	for at := (h ^ h>>15) & mask; ; at = (at + 1) & mask {
		if k := t.keys[at]; k == i+1 || k == 0 {
			return int(at)
		}
	}
}

// add changes a node's count and returns it; it never falls below 0. all is the number of nodes in the cluster.
func (t *tally) add(i, d int32, all int) int32 {
	if t.dense == nil && 4*(t.used+1) > 3*len(t.keys) {
		t.grow(all)
	}
	var v *int32
	if t.dense != nil {
		for int(i) >= len(t.dense) {
			t.dense = append(t.dense, 0)
		}
		v = &t.dense[i]
	} else {
		at := t.find(i)
		if t.keys[at] == 0 {
			t.keys[at] = i + 1
			t.used++
		}
		v = &t.vals[at]
	}
	old := *v
	*v = max(old+d, 0)
	switch {
	case old == 0 && *v > 0:
		t.nodes++
	case old > 0 && *v == 0:
		t.nodes--
	}
	return *v
}

func (t *tally) grow(all int) {
	old := *t
	*t = tally{}
	if all >= 64 && old.nodes >= all/4 {
		t.dense = make([]int32, all)
	} else {
		size := 8
		for size < 4*old.nodes {
			size *= 2
		}
		t.keys, t.vals = make([]int32, size), make([]int32, size)
	}
	old.each(func(i, n int32) { t.add(i, n, all) })
}

// each calls f for every node with a count.
func (t *tally) each(f func(i, n int32)) {
	for i, n := range t.dense {
		if n > 0 {
			f(int32(i), n)
		}
	}
	for at, n := range t.vals {
		if n > 0 {
			f(t.keys[at]-1, n)
		}
	}
}
