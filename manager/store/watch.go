package store

import (
	"slices"
	"strings"
	"sync"

	"skein/manager/api"
)

// maxDirty bounds what a watcher that does not take its keys can pile up; beyond it the watcher is told to look at everything. With many
// tasks the bound is half their number: below it, looking at everything costs more than the keys do.
const maxDirty = 1 << 16

// dirtyKey is the key of a changed object; of a task the id comes in its compact form, and is written out for those who watch.
type dirtyKey struct {
	Key
	task api.ID
}

// changes are what one entry changed. Immutable, and shared by all watchers.
type changes struct {
	keys  []Key
	count [kinds]int
}

// Watcher collects the keys of changed objects for one reader. Keys of one object coalesce when they are taken.
type Watcher struct {
	store *Store
	kinds [kinds]bool
	ready chan struct{}

	mu       sync.Mutex
	batches  [][]Key // of kinds that it watches and others
	n        int     // keys that it watches
	overflow bool
	limit    int
}

type watchID struct {
	kind Kind
	id   string
}

// Watch starts collecting changes of the given kinds, all kinds when none is given. Begin with a look at everything after this call:
// what is stored already is not reported.
func (s *Store) Watch(kinds ...Kind) *Watcher {
	w := &Watcher{store: s, ready: make(chan struct{}, 1), limit: maxDirty}
	for _, k := range kinds {
		w.kinds[k] = true
	}
	if len(kinds) == 0 {
		for k := range w.kinds {
			w.kinds[k] = true
		}
	}
	s.watchMu.Lock()
	defer s.watchMu.Unlock()
	s.watchers[w] = struct{}{}
	return w
}

// C receives when there is something to take.
func (w *Watcher) C() <-chan struct{} { return w.ready }

// Take returns the changed keys, in order of their first change, and empties the watcher. With overflow, too much changed to be listed
// (or a snapshot replaced everything): look at all objects.
func (w *Watcher) Take() (keys []Key, overflow bool) {
	w.mu.Lock()
	batches, n := w.batches, w.n
	overflow = w.overflow
	w.batches, w.n, w.overflow = nil, 0, false
	w.mu.Unlock()
	return w.coalesce(batches, n), overflow
}

// coalesce lists the keys that it watches, each once, as it was last.
func (w *Watcher) coalesce(batches [][]Key, n int) []Key {
	if n == 0 {
		return nil
	}
	keys, at := make([]Key, 0, n), make(map[watchID]int, n)
	for _, b := range batches {
		for _, k := range b {
			if !w.kinds[k.Kind] {
				continue
			}
			id := watchID{k.Kind, k.ID}
			if i, seen := at[id]; seen {
				keys[i] = k // a task may have got its node meanwhile
				continue
			}
			at[id] = len(keys)
			keys = append(keys, k)
		}
	}
	return keys
}

// Close ends the watching. C never receives again.
func (w *Watcher) Close() {
	w.store.watchMu.Lock()
	defer w.store.watchMu.Unlock()
	delete(w.store.watchers, w)
}

// wanted counts the keys it watches.
func (w *Watcher) wanted(c *changes) (n int) {
	for k, yes := range w.kinds {
		if yes {
			n += c.count[k]
		}
	}
	return n
}

func (w *Watcher) add(c *changes, tasks int) {
	n := w.wanted(c)
	if n == 0 {
		return
	}
	w.mu.Lock()
	if !w.overflow {
		b := c.keys
		if 2*n < len(b) { // do not hold what nobody asked for
			b = slices.DeleteFunc(slices.Clone(b), func(k Key) bool { return !w.kinds[k.Kind] })
		}
		w.batches, w.n = append(w.batches, b), w.n+n
		if limit := max(w.limit, tasks/2); w.n > limit {
			w.squeeze(limit)
		}
	}
	w.mu.Unlock()
	w.signal()
}

// squeeze coalesces early; what is still too much becomes an overflow.
func (w *Watcher) squeeze(limit int) {
	keys := w.coalesce(w.batches, w.n)
	if len(keys) > limit*3/4 {
		w.setOverflow()
		return
	}
	w.batches, w.n = [][]Key{keys}, len(keys)
}

func (w *Watcher) setOverflow() {
	w.batches, w.n, w.overflow = nil, 0, true
}

func (w *Watcher) signal() {
	select {
	case w.ready <- struct{}{}:
	default:
	}
}

// publish tells the watchers what an entry changed; tasks is how many there are.
func (s *Store) publish(dirty []dirtyKey, tasks int) {
	if len(dirty) == 0 {
		return
	}
	s.watchMu.Lock()
	defer s.watchMu.Unlock()
	if c := s.written(dirty); c != nil {
		for w := range s.watchers {
			w.add(c, tasks)
		}
	}
}

// written writes the keys out, if anybody watches objects of these kinds.
func (s *Store) written(dirty []dirtyKey) *changes {
	var c changes
	for i := range dirty {
		c.count[dirty[i].Kind]++
	}
	watched := 0
	for w := range s.watchers {
		watched += w.wanted(&c)
	}
	if watched == 0 {
		return nil
	}
	var text strings.Builder
	text.Grow(25 * c.count[KindTask])
	var id [32]byte
	c.keys = make([]Key, len(dirty))
	for i := range dirty {
		c.keys[i] = dirty[i].Key
		if d := &dirty[i]; d.Kind == KindTask {
			at := text.Len()
			text.Write(d.task.Append(id[:0]))
			c.keys[i].ID = text.String()[at:]
		}
	}
	return &c
}

// publishAll tells every watcher that everything may have changed.
func (s *Store) publishAll() {
	s.watchMu.Lock()
	defer s.watchMu.Unlock()
	for w := range s.watchers {
		w.mu.Lock()
		w.setOverflow()
		w.mu.Unlock()
		w.signal()
	}
}
