package loop

import (
	"container/heap"
	"time"
)

// Agenda remembers for a controller which of its objects want to be looked at again, and when. It is derived from the store: the
// first Step of a term fills it. Setting costs a logarithm of what is in it, asking costs what is due.
type Agenda[K comparable] struct {
	entries map[K]*agendaEntry[K]
	heap    agendaHeap[K]
}

type agendaEntry[K comparable] struct {
	key K
	at  int64 // unix nanos
	i   int   // in the heap
}

// Set replaces the instant of an object; the zero time removes it.
func (a *Agenda[K]) Set(key K, at time.Time) {
	if at.IsZero() {
		a.SetNano(key, 0)
		return
	}
	a.SetNano(key, at.UnixNano())
}

// SetNano is Set with unix nanoseconds, of which 0 is none.
func (a *Agenda[K]) SetNano(key K, at int64) {
	e := a.entries[key]
	switch {
	case at == 0 && e == nil:
	case at == 0:
		heap.Remove(&a.heap, e.i)
		delete(a.entries, key)
	case e == nil:
		if a.entries == nil {
			a.entries = map[K]*agendaEntry[K]{}
		}
		e = &agendaEntry[K]{key: key, at: at}
		a.entries[key] = e
		heap.Push(&a.heap, e)
	case e.at != at:
		e.at = at
		heap.Fix(&a.heap, e.i)
	}
}

// Due returns the objects whose instant has come, in no particular order, and forgets them: whoever still wants one sets it again.
func (a *Agenda[K]) Due(now time.Time) []K {
	var keys []K
	for len(a.heap) > 0 && a.heap[0].at <= now.UnixNano() {
		e := heap.Pop(&a.heap).(*agendaEntry[K])
		delete(a.entries, e.key)
		keys = append(keys, e.key)
	}
	return keys
}

// Next returns the earliest instant, zero for none.
func (a *Agenda[K]) Next() time.Time {
	if len(a.heap) == 0 {
		return time.Time{}
	}
	return time.Unix(0, a.heap[0].at)
}

type agendaHeap[K comparable] []*agendaEntry[K]

func (h agendaHeap[K]) Len() int           { return len(h) }
func (h agendaHeap[K]) Less(i, j int) bool { return h[i].at < h[j].at }
func (h agendaHeap[K]) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].i, h[j].i = i, j
}

// Push implements heap.Interface.
func (h *agendaHeap[K]) Push(x any) {
	e := x.(*agendaEntry[K])
	e.i = len(*h)
	*h = append(*h, e)
}

// Pop implements heap.Interface.
func (h *agendaHeap[K]) Pop() any {
	old := *h
	e := old[len(old)-1]
	old[len(old)-1] = nil
	*h = old[:len(old)-1]
	return e
}
