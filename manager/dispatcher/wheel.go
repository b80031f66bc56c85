package dispatcher

import "time"

// The wheel looks at each node when its lease may have ended. A beat only notes its time: nothing is moved or armed by it, and a turn costs
// the nodes of one slot.
const (
	wheelStep  = 100 * time.Millisecond
	wheelSlots = 64 // a turn of 6.4 s: longer than a lease or a grace
)

type wheel struct {
	began time.Time
	at    int // step that was taken last
	count int // nodes in it
	slots [wheelSlots][]*node
}

func newWheel(now time.Time) *wheel { return &wheel{began: now} }

// add has a node returned by the step of an instant, or by the next step; at most a turn ahead.
func (w *wheel) add(n *node, at time.Time) {
	step := int((at.Sub(w.began) + wheelStep - 1) / wheelStep)
	step = min(max(step, w.at+1), w.at+wheelSlots-1)
	w.slots[step%wheelSlots] = append(w.slots[step%wheelSlots], n)
	w.count++
}

// due takes the steps up to now and returns the nodes in them.
func (w *wheel) due(now time.Time) (out []*node) {
	for last := int(now.Sub(w.began) / wheelStep); w.at < last; {
		if last-w.at > wheelSlots {
			w.at = last - wheelSlots // all of it is due
		}
		w.at++
		slot := &w.slots[w.at%wheelSlots]
		w.count -= len(*slot)
		out = append(out, *slot...)
		clear(*slot)
		*slot = (*slot)[:0]
	}
	return out
}
