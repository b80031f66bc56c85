package store

import "sync"

// maxDirty bounds what a watcher that does not take its keys can pile up; beyond it the watcher is told to look at everything.
const maxDirty = 1 << 16

// Watcher collects the keys of changed objects for one reader. Keys of one object coalesce.
type Watcher struct {
	store *Store
	kinds [kinds]bool
	ready chan struct{}

	mu       sync.Mutex
	keys     []Key
	at       map[watchID]int
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
	w := &Watcher{store: s, ready: make(chan struct{}, 1), at: map[watchID]int{}, limit: maxDirty}
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
	defer w.mu.Unlock()
	keys, overflow = w.keys, w.overflow
	w.keys, w.overflow = nil, false
	clear(w.at)
	return keys, overflow
}

// Close ends the watching. C never receives again.
func (w *Watcher) Close() {
	w.store.watchMu.Lock()
	defer w.store.watchMu.Unlock()
	delete(w.store.watchers, w)
}

func (w *Watcher) add(keys []Key) {
	w.mu.Lock()
	added := false
	for _, k := range keys {
		if !w.kinds[k.Kind] {
			continue
		}
		added = true
		if w.overflow {
			break
		}
		id := watchID{k.Kind, k.ID}
		if i, seen := w.at[id]; seen {
			w.keys[i] = k // a task may have got its node meanwhile
			continue
		}
		if len(w.keys) == w.limit {
			w.setOverflow()
			break
		}
		w.at[id] = len(w.keys)
		w.keys = append(w.keys, k)
	}
	w.mu.Unlock()
	if added {
		w.signal()
	}
}

func (w *Watcher) setOverflow() {
	w.keys, w.overflow = nil, true
	clear(w.at)
}

func (w *Watcher) signal() {
	select {
	case w.ready <- struct{}{}:
	default:
	}
}

func (s *Store) publish(keys []Key) {
	if len(keys) == 0 {
		return
	}
	s.watchMu.Lock()
	defer s.watchMu.Unlock()
	for w := range s.watchers {
		w.add(keys)
	}
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
