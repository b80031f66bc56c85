package supervisor

import (
	"context"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// maxKept bounds the descriptors that the daemon keeps of one container.
const maxKept = 12

// keepLimit bounds the wait for the daemon to take descriptors; then it asks anew for all.
const keepLimit = time.Second

// The parts of a process that are kept, in the order of their descriptors.
const (
	partHandle  = 'h'
	partStdin   = 'i'
	partConsole = 't'
	partStdout  = 'o'
	partStderr  = 'e'
)

// kept tells the daemon about duplicates of a process's descriptors, so that they outlive this process.
type kept struct {
	// Op is hold; drop, for all of a process; stdin, for that alone; synced, when all that there was has been told; replaced, when
	// another client keeps from now on.
	Op     string
	ID     string `json:",omitempty"`
	ExecID string `json:",omitempty"`
	PID    int    `json:",omitempty"`
	Parts  string `json:",omitempty"`
}

// keeper is the daemon's connection that duplicates of terminals, pipes and process handles are sent on.
type keeper struct {
	mu    sync.Mutex
	w     *wire               // nil: nobody keeps
	held  map[*process]string // parts
	count map[string]int      // by container
}

// serve makes w the keeper's connection, tells it everything there is, and stays until the client is gone or another takes its place.
func (k *keeper) serve(ctx context.Context, s *server, w *wire, free func()) error {
	k.mu.Lock()
	if k.w != nil {
		old := k.w
		k.send(old, kept{Op: "replaced"})
		old.close()
	}
	k.w, k.held, k.count = w, map[*process]string{}, map[string]int{}
	k.mu.Unlock()
	for _, c := range s.all() {
		c.mu.Lock()
		list := make([]*process, 0, 1+len(c.execs))
		if c.init != nil {
			list = append(list, c.init)
		}
		for _, p := range c.execs {
			list = append(list, p)
		}
		c.mu.Unlock()
		for _, p := range list {
			k.hold(c.id, p)
		}
	}
	k.mu.Lock()
	k.send(w, kept{Op: "synced"})
	k.mu.Unlock()
	free()
	<-ctx.Done()
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.w == w {
		k.w = nil
	}
	return nil
}

// hold sends duplicates of a process's descriptors, as far as the container's bound allows.
func (k *keeper) hold(id string, p *process) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.w == nil || p.gone {
		return
	}
	files := map[byte]*os.File{partHandle: p.fd, partConsole: p.console, partStdin: p.stdin}
	if p.console != nil {
		delete(files, partStdin)
	} else {
		p.out.mu.Lock()
		for _, s := range p.out.streams {
			if !s.ended {
				files[streamPart(s.kind)] = s.f
			}
		}
		p.out.mu.Unlock()
	}
	var parts strings.Builder
	var fds []int
	defer func() { closeFDs(fds) }()
	for _, part := range []byte{partHandle, partStdin, partConsole, partStdout, partStderr} {
		if files[part] == nil {
			continue
		}
		dup, err := dupNumber(files[part])
		if err != nil {
			continue // closed meanwhile
		}
		parts.WriteByte(part)
		fds = append(fds, dup)
	}
	if k.count[id]+len(fds) > maxKept {
		return
	}
	k.held[p] = parts.String()
	k.count[id] += len(fds)
	k.send(k.w, kept{Op: "hold", ID: id, ExecID: p.id, PID: p.pid, Parts: parts.String()}, fds...)
}

func streamPart(kind byte) byte {
	if kind == frameStderr {
		return partStderr
	}
	return partStdout
}

// dropStdin lets go of a standard input that is closed here: its reader shall see the end.
func (k *keeper) dropStdin(id string, p *process) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if strings.IndexByte(k.held[p], partStdin) >= 0 {
		k.held[p] = strings.ReplaceAll(k.held[p], string(rune(partStdin)), "")
		k.count[id]--
		k.send(k.w, kept{Op: "stdin", ID: id, ExecID: p.id, PID: p.pid})
	}
}

// drop lets go of a process that has ended.
func (k *keeper) drop(id string, p *process) {
	k.mu.Lock()
	defer k.mu.Unlock()
	p.gone = true
	if parts, ok := k.held[p]; ok {
		k.count[id] -= len(parts)
		if k.count[id] == 0 {
			delete(k.count, id)
		}
		delete(k.held, p)
		k.send(k.w, kept{Op: "drop", ID: id, ExecID: p.id, PID: p.pid})
	}
}

// send is called with mu held. A client that does not read loses its connection, and asks for everything again.
func (k *keeper) send(w *wire, m kept, fds ...int) {
	if w == nil || w != k.w {
		return
	}
	_ = w.conn.SetWriteDeadline(time.Now().Add(keepLimit))
	if w.writeJSON(frameKept, m, fds...) != nil {
		w.close()
		k.w = nil
	}
}

func dupNumber(f *os.File) (int, error) {
	got := -1
	err := control(f, func(fd int) error {
		var err error
		got, err = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
		return err
	})
	return got, err
}
