package placement

import (
	"time"

	"skein/manager/store"
	"skein/scheduler"
)

// waits remembers what was looked at in vain, so that a place that becomes free costs a question for each group that waits, and a look at the
// tasks of those that fit there. Whoever waits fitted nowhere when it was looked at; since then only nodes that were freed can have room.
// Where priorities differ, a pass looks at everything: what ends for whom depends on all that wait.
type waits struct {
	groups map[string][]scheduler.Group // service → its groups that fitted nowhere
	freed  map[string]struct{}          // nodes on which something ended since
	open   map[string]struct{}          // services whose tasks must be looked at
	full   time.Time                    // when everything was looked at last
	stale  bool                         // reasons that were told then may have changed
}

func newWaits() waits {
	return waits{groups: map[string][]scheduler.Group{}, freed: map[string]struct{}{}, open: map[string]struct{}{}}
}

// whoFits opens the services that may find room now. It reports whether there is anything to look at, and when reasons are to be told anew.
func (p *Placement) whoFits(view store.ReadTx, now time.Time) (look bool, wake time.Time) {
	w := &p.waits
	p.leastPriority(view)
	w.stale = w.stale || len(w.freed) > 0
	touched := len(w.freed)+len(w.open) > 0
	if again := w.full.Add(explainEvery); (p.mixed && touched) || (w.stale && !now.Before(again)) {
		p.changed = true
	} else if w.stale {
		wake = again
	}
	if p.changed {
		clear(w.freed)
		w.full, w.stale = now, false
		return true, time.Time{}
	}
	for node := range w.freed {
		i := p.sched.Number(node)
		for service, groups := range w.groups {
			if _, known := w.open[service]; known {
				continue
			}
			for k := range groups {
				if p.sched.Fits(&groups[k], i) {
					w.open[service] = struct{}{}
					break
				}
			}
		}
	}
	clear(w.freed)
	return len(w.open) > 0, wake
}

// begin forgets what is looked at now.
func (w *waits) begin(all bool) {
	if all {
		clear(w.groups)
	}
	for service := range w.open {
		delete(w.groups, service)
	}
	clear(w.open)
}

// add notes a group that found no room for all its tasks. One that asks for what cannot be understood waits for its service to change.
func (w *waits) add(g *group) {
	if g.err == nil {
		w.groups[g.Service] = append(w.groups[g.Service], g.Group)
	}
}
