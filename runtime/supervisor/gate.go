package supervisor

import (
	"sync"
	"time"
)

// gate counts work that must not be cut in half: requests, and the recording of an end. Closed, it lets nothing begin.
type gate struct {
	mu     sync.Mutex
	busy   int
	closed bool
	change chan struct{} // closed and replaced at every change
}

func newGate() *gate { return &gate{change: make(chan struct{})} }

// tell wakes those that wait. It is called with mu held.
func (g *gate) tell() {
	close(g.change)
	g.change = make(chan struct{})
}

// enter begins a piece of work, when the gate is open.
func (g *gate) enter() {
	g.mu.Lock()
	for g.closed {
		c := g.change
		g.mu.Unlock()
		<-c
		g.mu.Lock()
	}
	g.busy++
	g.mu.Unlock()
}

func (g *gate) leave() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.busy--
	if g.busy == 0 {
		g.tell()
	}
}

// shut closes the gate at the first moment when no work is under way; until then work may begin, for what is under way may wait for
// it. False: there was no such moment before the deadline.
func (g *gate) shut(deadline time.Time) bool {
	t := time.NewTimer(time.Until(deadline))
	defer t.Stop()
	for {
		g.mu.Lock()
		if g.busy == 0 {
			g.closed = true
			g.mu.Unlock()
			return true
		}
		c := g.change
		g.mu.Unlock()
		select {
		case <-c:
		case <-t.C:
			return false
		}
	}
}

func (g *gate) open() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closed = false
	g.tell()
}

// halt stops a group of goroutines at points of their choice and lets them go on.
type halt struct {
	mu     sync.Mutex
	all    int
	parked int
	ask    chan struct{} // closed: stop
	goOn   chan struct{} // closed: go on
	change chan struct{} // closed and replaced at every change
}

func newHalt() *halt {
	return &halt{ask: make(chan struct{}), goOn: make(chan struct{}), change: make(chan struct{})}
}

func (h *halt) tell() {
	close(h.change)
	h.change = make(chan struct{})
}

// join adds the calling goroutine, or one that it is about to start; leave takes it away.
func (h *halt) join() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.all++
}

func (h *halt) leave() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.all--
	h.tell()
}

// asked is closed when members shall park.
func (h *halt) asked() <-chan struct{} {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.ask
}

// park stops a member until resume, if they are asked to stop.
func (h *halt) park() {
	h.mu.Lock()
	select {
	case <-h.ask:
	default:
		h.mu.Unlock()
		return
	}
	h.parked++
	h.tell()
	c := h.goOn
	h.mu.Unlock()
	<-c
}

// wakeAgain is how often members that wait in the kernel are woken, since one may have begun to wait just after.
const wakeAgain = 10 * time.Millisecond

// stop asks all to park and returns true when they have; wake makes those notice that wait in the kernel.
func (h *halt) stop(deadline time.Time, wake func()) bool {
	h.mu.Lock()
	close(h.ask)
	h.mu.Unlock()
	for {
		wake()
		h.mu.Lock()
		done, c := h.parked == h.all, h.change
		h.mu.Unlock()
		if done {
			return true
		}
		left := time.Until(deadline)
		if left <= 0 {
			return false
		}
		t := time.NewTimer(min(wakeAgain, left))
		select {
		case <-c:
		case <-t.C:
		}
		t.Stop()
	}
}

// resume lets all go on that parked, also after a stop that came too late.
func (h *halt) resume() {
	h.mu.Lock()
	defer h.mu.Unlock()
	close(h.goOn)
	h.goOn, h.ask, h.parked = make(chan struct{}), make(chan struct{}), 0
}
