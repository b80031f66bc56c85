package loop

import (
	"slices"
	"time"
)

// Agenda remembers for a controller which of its objects want to be looked at again, and when. It is derived from the store: the
// first Step of a term fills it.
type Agenda struct {
	at map[string]time.Time
}

// Set replaces the instant of an object; the zero time removes it.
func (a *Agenda) Set(id string, at time.Time) {
	if at.IsZero() {
		delete(a.at, id)
		return
	}
	if a.at == nil {
		a.at = map[string]time.Time{}
	}
	a.at[id] = at
}

// Due returns the objects whose instant has come, sorted. They stay until Set says otherwise.
func (a *Agenda) Due(now time.Time) []string {
	var ids []string
	for id, at := range a.at {
		if !now.Before(at) {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids
}

// Next returns the earliest instant, zero for none.
func (a *Agenda) Next() time.Time {
	var next time.Time
	for _, at := range a.at {
		if next.IsZero() || at.Before(next) {
			next = at
		}
	}
	return next
}
