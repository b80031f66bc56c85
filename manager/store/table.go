package store

import (
	"cmp"
	"strings"

	"github.com/google/btree"

	"skein/manager/allocator"
)

// degree of the trees: nodes of 32 to 63 rows keep copies for a snapshot small and lookups short.
const degree = 32

type row[K, V any] struct {
	key K
	val V
}

// table is an ordered map whose changes are journaled and which can be copied in no time (copy on write).
type table[K, V any] struct {
	tree *btree.BTreeG[row[K, V]]
	j    *allocator.Journal
}

func newTable[K, V any](j *allocator.Journal, compare func(a, b K) int) table[K, V] {
	less := func(a, b row[K, V]) bool { return compare(a.key, b.key) < 0 }
	return table[K, V]{tree: btree.NewG(degree, less), j: j}
}

func (t table[K, V]) get(k K) V {
	r, _ := t.tree.Get(row[K, V]{key: k})
	return r.val
}

func (t table[K, V]) put(k K, v V) {
	old, had := t.tree.ReplaceOrInsert(row[K, V]{k, v})
	t.j.Add(func() {
		if had {
			t.tree.ReplaceOrInsert(old)
		} else {
			t.tree.Delete(row[K, V]{key: k})
		}
	})
}

func (t table[K, V]) del(k K) {
	if old, had := t.tree.Delete(row[K, V]{key: k}); had {
		t.j.Add(func() { t.tree.ReplaceOrInsert(old) })
	}
}

// from calls f for the rows at or above k, in order, until it returns false.
func (t table[K, V]) from(k K, f func(K, V) bool) {
	t.tree.AscendGreaterOrEqual(row[K, V]{key: k}, func(r row[K, V]) bool { return f(r.key, r.val) })
}

func (t table[K, V]) all() []V {
	out := make([]V, 0, t.tree.Len())
	t.tree.Ascend(func(r row[K, V]) bool {
		out = append(out, r.val)
		return true
	})
	return out
}

// pair is a key of two ids: node and task, or network and service.
type pair struct{ a, b string }

func comparePair(x, y pair) int { return cmp.Or(strings.Compare(x.a, y.a), strings.Compare(x.b, y.b)) }

type revKey struct {
	service string
	number  uint64
}

func compareRevision(x, y revKey) int {
	return cmp.Or(strings.Compare(x.service, y.service), cmp.Compare(x.number, y.number))
}

// down calls f for the rows at or below k, from the highest, until it returns false.
func (t table[K, V]) down(k K, f func(K, V) bool) {
	t.tree.DescendLessOrEqual(row[K, V]{key: k}, func(r row[K, V]) bool { return f(r.key, r.val) })
}

// clone is a copy that later changes of either do not touch.
func (t table[K, V]) clone() table[K, V] { return table[K, V]{tree: t.tree.Clone(), j: t.j} }
