package supervisor

import (
	"context"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// orphans reaps what becomes a child of this process without having been started by it: the grandchildren of containers that share the
// host's pid namespace. Other containers have a first process of their own that reaps.
type orphans struct {
	mu     sync.Mutex
	wanted bool         // a container without a pid namespace exists or existed
	own    map[int]bool // children that somebody waits for
	signal chan os.Signal
}

func newOrphans() *orphans {
	return &orphans{own: map[int]bool{}, signal: make(chan os.Signal, 1)}
}

// add marks a child as waited for, remove undoes it.
func (o *orphans) add(pid int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.own[pid] = true
}

func (o *orphans) remove(pid int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	delete(o.own, pid)
}

// start starts a command that its caller waits for.
func (o *orphans) start(cmd *exec.Cmd) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	err := cmd.Start()
	if err == nil {
		o.own[cmd.Process.Pid] = true
	}
	return err
}

// claim is add for a child that nobody may be waiting for yet.
func (o *orphans) claim(pid int) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.own[pid] {
		return false
	}
	o.own[pid] = true
	return true
}

// expect starts the reaping once a container needs it.
func (o *orphans) expect(s *specs.Spec) {
	for _, n := range s.Linux.Namespaces {
		if n.Type == specs.PIDNamespace {
			return
		}
	}
	o.always()
}

// always starts the reaping, of those too that have ended before.
func (o *orphans) always() {
	o.mu.Lock()
	defer o.mu.Unlock()
	defer func() {
		select {
		case o.signal <- unix.SIGCHLD:
		default:
		}
	}()
	if !o.wanted {
		o.wanted = true
		signal.Notify(o.signal, unix.SIGCHLD)
	}
}

// never ends the reaping.
func (o *orphans) never() { signal.Stop(o.signal) }

// run reaps until ctx is done.
func (o *orphans) run(ctx context.Context, zygote func() int) {
	defer o.never()
	for {
		select {
		case <-ctx.Done():
			return
		case <-o.signal:
			o.reap(zygote())
		}
	}
}

func (o *orphans) reap(zygote int) {
	lists, err := filepath.Glob("/proc/self/task/*/children")
	if err != nil {
		return
	}
	for _, l := range lists {
		b, err := os.ReadFile(l)
		if err != nil {
			continue // the thread ended
		}
		for _, f := range strings.Fields(string(b)) {
			pid, err := strconv.Atoi(f)
			if err != nil || pid == zygote {
				continue
			}
			o.mu.Lock()
			own := o.own[pid]
			o.mu.Unlock()
			if !own {
				_, _ = unix.Wait4(pid, nil, unix.WNOHANG, nil)
			}
		}
	}
}
