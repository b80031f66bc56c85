package world

import (
	"time"

	"skein/manager/store"
)

// faults has things go wrong until all is calm.
func (w *World) faults() {
	every := func(from, to time.Duration, do func()) {
		var again func()
		again = func() {
			if w.calm {
				return
			}
			do()
			w.after(w.between(from, to), again)
		}
		w.after(w.between(from, to), again)
	}
	every(2*time.Second, 12*time.Second, w.managerFault)
	every(time.Second, 8*time.Second, w.nodeFault)
	every(5*time.Second, 20*time.Second, w.compare)
	w.after(500*time.Millisecond, w.group)
	w.after(time.Second, w.adopt)
}

// group makes the group of managers follow the roles, now and then.
func (w *World) group() {
	w.keepGroup()
	w.elect()
	w.after(500*time.Millisecond, w.group)
}

// adopt makes machines for records whose joining had an unknown outcome.
func (w *World) adopt() {
	w.state(func(tx store.ReadTx) {
		for _, n := range tx.Nodes() {
			if w.nodes[n.Id] == nil {
				w.add(w.machine(n.Id, n.Role, n.Labels["zone"]))
			}
		}
	})
	w.after(time.Second, w.adopt)
}

func (w *World) managerFault() {
	var members []*manager
	for _, m := range w.managers {
		if m.member {
			members = append(members, m)
		}
	}
	if len(members) == 0 {
		return
	}
	m := pick(w, members)
	if w.r.IntN(2) == 0 && w.leader != nil {
		m = w.leader
	}
	switch w.r.IntN(4) {
	case 0:
		w.crash(m, w.between(100*time.Millisecond, 10*time.Second))
	case 1:
		w.isolate(m, w.between(100*time.Millisecond, 10*time.Second))
	case 2:
		if w.leader != nil {
			w.note("%s hands the leadership over", w.leader.name)
			w.depose(w.leader)
		}
	case 3: // a follower installs a snapshot
		if m != w.leader && m.up && m.term == nil {
			m.life++
			m.lag = false
			m.restore(w.log.observer, len(w.log.entries))
			w.note("%s installs a snapshot", m.name)
		}
	}
}

func (w *World) nodeFault() {
	if len(w.names) == 0 {
		return
	}
	n := w.nodes[pick(w, w.names)]
	switch w.r.IntN(6) {
	case 0, 1:
		n.setCut(w.between(100*time.Millisecond, 15*time.Second))
	case 2:
		n.restart(w.between(100*time.Millisecond, 8*time.Second), false, w.r.IntN(3) == 0)
	case 3:
		n.restart(w.between(time.Second, 20*time.Second), true, w.r.IntN(3) == 0)
	case 4: // containers die without their agent's doing
		for _, id := range keys(n.tasks) {
			if c := n.holds[id]; c != nil && c.running && w.r.IntN(3) == 0 {
				c.running, c.ended, c.code = false, true, 137
				n.tasks[id].poke()
			}
		}
	case 5: // more or less memory after the next start
		n.mem, n.desc = int64(2+w.r.IntN(7))<<30, nil
		n.restart(w.between(100*time.Millisecond, time.Second), true, false)
	}
}
