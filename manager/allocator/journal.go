package allocator

// Journal collects the undo steps of changes in memory, so that a transaction can be refused after part of it was done. The store and
// its allocator share one; a refused item inside a transaction goes back to a mark.
type Journal struct {
	undo []step
}

// step takes one change back: an address that was taken, which is what happens most, or anything else.
type step struct {
	fn   func()
	pool *pool
	off  uint32
}

// Add appends the step that takes the last change back.
func (j *Journal) Add(undo func()) { j.undo = append(j.undo, step{fn: undo}) }

func (j *Journal) addTaken(p *pool, off uint32) { j.undo = append(j.undo, step{pool: p, off: off}) }

// Mark names the present point.
func (j *Journal) Mark() int { return len(j.undo) }

// Rollback undoes everything since the mark, newest first.
func (j *Journal) Rollback(mark int) {
	for i := len(j.undo) - 1; i >= mark; i-- {
		if s := j.undo[i]; s.pool != nil {
			s.pool.unset(s.off)
		} else {
			s.fn()
		}
	}
	j.truncate(mark)
}

// Commit forgets all undo steps.
func (j *Journal) Commit() { j.truncate(0) }

func (j *Journal) truncate(n int) {
	clear(j.undo[n:])
	j.undo = j.undo[:n]
}

// Set stores a map entry and journals the old one.
func Set[K comparable, V any](j *Journal, m map[K]V, k K, v V) {
	old, had := m[k]
	j.Add(func() { putBack(m, k, old, had) })
	m[k] = v
}

// Unset deletes a map entry and journals it.
func Unset[K comparable, V any](j *Journal, m map[K]V, k K) {
	old, had := m[k]
	if !had {
		return
	}
	j.Add(func() { m[k] = old })
	delete(m, k)
}

func putBack[K comparable, V any](m map[K]V, k K, old V, had bool) {
	if had {
		m[k] = old
	} else {
		delete(m, k)
	}
}
