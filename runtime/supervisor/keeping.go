package supervisor

import (
	"context"
	"encoding/json"
	"time"

	"golang.org/x/sys/unix"
)

// keeping is the client's side of keeper: it holds duplicates of the containers' terminals, pipes and process handles. While no
// supervisor runs, who writes waits instead of failing, who reads does not see the end, and terminals do not hang up; the next
// supervisor gets them all.
type keeping struct {
	m    map[keptKey]*keptProcess
	old  map[keptKey]*keptProcess // of an earlier connection, until all has been told again
	idle chan struct{}            // closed while there is no connection
}

type keptKey struct{ id, execID string }

type keptProcess struct {
	pid   int
	parts string
	fds   []int
}

func newKeeping() *keeping {
	idle := make(chan struct{})
	close(idle)
	return &keeping{m: map[keptKey]*keptProcess{}, old: map[keptKey]*keptProcess{}, idle: idle}
}

// keep holds what the supervisors tell until the client is closed; it calls synced once, when everything there is is held.
func (c *client) keep(synced func()) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		<-c.done
		cancel()
	}()
	defer func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.kept.drop(c.kept.m)
		c.kept.drop(c.kept.old)
	}()
	for wait := retryMin; ; wait = min(2*wait, retryMax) {
		switch connected, replaced := c.keepOnce(ctx, synced); {
		case replaced:
			return
		case connected:
			wait = retryMin
		}
		t := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			t.Stop()
			return
		case <-t.C:
		}
	}
}

// keepOnce follows one connection to its end. What was held before stays until the supervisor has told all there is.
func (c *client) keepOnce(ctx context.Context, synced func()) (connected, replaced bool) {
	w, stop, err := c.open(ctx, &request{Op: "keep"})
	if err != nil {
		return false, false
	}
	defer stop()
	idle := make(chan struct{})
	c.mu.Lock()
	c.kept.idle = idle
	for k, p := range c.kept.m { // of two, the one told last
		c.kept.forget(c.kept.old, k)
		c.kept.old[k] = p
	}
	c.kept.m = map[keptKey]*keptProcess{}
	c.mu.Unlock()
	defer close(idle)
	for {
		kind, b, fds, err := w.read()
		if err != nil || kind != frameKept {
			closeFDs(fds)
			return connected, false
		}
		var m kept
		if json.Unmarshal(b, &m) != nil || m.Op == "replaced" {
			closeFDs(fds)
			return connected, m.Op == "replaced"
		}
		c.mu.Lock()
		c.kept.take(m, fds)
		c.mu.Unlock()
		if m.Op == "synced" {
			connected = true
			synced()
		}
	}
}

func (k *keeping) take(m kept, fds []int) {
	key := keptKey{m.ID, m.ExecID}
	switch m.Op {
	case "hold":
		if len(fds) != len(m.Parts) { // too many open files here
			closeFDs(fds)
			return
		}
		k.forget(k.m, key)
		k.m[key] = &keptProcess{pid: m.PID, parts: m.Parts, fds: fds}
		return
	case "drop":
		k.forget(k.m, key)
		k.forget(k.old, key)
	case "stdin":
		for _, set := range []map[keptKey]*keptProcess{k.m, k.old} {
			if p := set[key]; p != nil {
				p.letGo(partStdin)
			}
		}
	case "synced":
		k.drop(k.old)
	}
	closeFDs(fds)
}

func (k *keeping) forget(set map[keptKey]*keptProcess, key keptKey) {
	if p := set[key]; p != nil {
		closeFDs(p.fds)
		delete(set, key)
	}
}

func (k *keeping) drop(set map[keptKey]*keptProcess) {
	for key := range set {
		k.forget(set, key)
	}
}

func (p *keptProcess) letGo(part byte) {
	for i := range len(p.parts) {
		if p.parts[i] == part {
			unix.Close(p.fds[i])
			p.parts = p.parts[:i] + p.parts[i+1:]
			p.fds = append(p.fds[:i:i], p.fds[i+1:]...)
			return
		}
	}
}

// settle waits until everything that a dead supervisor has sent is held.
func (c *client) settle() {
	c.mu.Lock()
	idle := c.kept.idle
	c.mu.Unlock()
	t := time.NewTimer(requestLimit)
	defer t.Stop()
	select {
	case <-idle:
	case <-t.C:
	}
}

// give describes all that is held for a new supervisor; duplicates of the descriptors are returned, and shall be its own from number from on.
func (c *client) give(from int) (*state, []int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	st := &state{Lock: -1, Listener: -1, Client: -1}
	var fds []int
	by := map[string]int{}
	add := func(key keptKey, p *keptProcess) {
		i, ok := by[key.id]
		if !ok {
			i = len(st.Containers)
			by[key.id] = i
			st.Containers = append(st.Containers, containerState{ID: key.id})
		}
		ps := processState{ID: key.execID, PID: p.pid, Handle: -1, Stdin: -1, Console: -1}
		for j := range len(p.parts) {
			dup, err := unix.FcntlInt(uintptr(p.fds[j]), unix.F_DUPFD_CLOEXEC, 3)
			if err != nil {
				continue // too many open files here
			}
			n := from + len(fds)
			fds = append(fds, dup)
			switch p.parts[j] {
			case partHandle:
				ps.Handle = n
			case partStdin:
				ps.Stdin = n
			case partConsole:
				ps.Console = n
			case partStdout:
				ps.Streams = append(ps.Streams, streamState{Kind: frameStdout, File: n})
			case partStderr:
				ps.Streams = append(ps.Streams, streamState{Kind: frameStderr, File: n})
			}
		}
		st.Containers[i].Processes = append(st.Containers[i].Processes, ps)
	}
	for key, p := range c.kept.m {
		add(key, p)
	}
	for key, p := range c.kept.old {
		if c.kept.m[key] == nil {
			add(key, p)
		}
	}
	return st, fds
}
