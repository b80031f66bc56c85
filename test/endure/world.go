package main

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/moby/moby/client"

	"skein/cmd/dev"
	"skein/test/images"
)

const (
	upTime   = time.Minute
	pollStep = 20 * time.Millisecond

	maxBroken = 50 // promises, after which the program ends
)

// world is a development node under test.
type world struct {
	opts   options
	begun  time.Time
	dir    string // of built programs
	node   *dev.Node
	clus   *dev.Cluster
	api    *client.Client
	images *http.Server
	image  string // reference of the program inside

	run     string // the run under way
	figures []string
	giveUp  context.CancelFunc // ends the program early

	mu     sync.Mutex // guards what follows
	rand   *rand.Rand
	broken []string
	serial int
	epoch  int           // counts kills
	up     chan struct{} // closed while everything is there that is not to be dead
}

func newWorld(ctx context.Context, o options) (w *world, err error) {
	w = &world{opts: o, begun: time.Now(), rand: rand.New(rand.NewPCG(o.seed, 0xe2d)), up: make(chan struct{}), giveUp: func() {}}
	close(w.up)
	w.say("seed %d", o.seed)
	defer func() {
		if err != nil {
			w.down()
		}
	}()
	if err := w.build(ctx); err != nil {
		return w, err
	}
	if err := dev.Down(o.name); err != nil { // of a run that was killed
		return w, err
	}
	uctx, cancel := context.WithTimeout(ctx, upTime)
	defer cancel()
	if w.clus, err = dev.Up(uctx, dev.Options{Name: o.name, Managers: 1, Binary: w.opts.binary}); err != nil {
		return w, err
	}
	w.node = w.clus.Nodes[0]
	if w.api, err = w.node.Client(); err != nil {
		return w, err
	}
	if err := w.serve(); err != nil {
		return w, err
	}
	res, err := w.api.ImagePull(uctx, w.image, client.ImagePullOptions{})
	if err != nil {
		return w, err
	}
	defer res.Close()
	_, err = io.Copy(io.Discard, res)
	return w, err
}

// build compiles the programs; a given executable is used as it is.
func (w *world) build(ctx context.Context) (err error) {
	if w.dir, err = os.MkdirTemp("", "skein-endure-"); err != nil {
		return err
	}
	w.opts.binary, err = images.BuildAll(ctx, w.dir, w.opts.binary, map[string]string{"inside": "skein/test/endure/inside"})
	return err
}

// serve offers the program inside as an image.
func (w *world) serve() (err error) {
	var repo string
	w.images, repo, err = images.Serve(w.clus.HostAddr(), images.Program{Ref: "inside:v1", Path: "/inside", File: filepath.Join(w.dir, "inside")})
	w.image = repo + "/inside:v1"
	return err
}

// down removes everything and looks for leftovers.
func (w *world) down() {
	if w.api != nil {
		_ = w.api.Close()
	}
	if w.images != nil {
		_ = w.images.Close()
	}
	if w.clus != nil {
		if err := dev.Down(w.opts.name); err != nil {
			w.breaks("take the node down: %v", err)
		}
		for _, x := range dev.Leftovers(w.opts.name) {
			w.breaks("left behind: %s", x)
		}
	}
	_ = os.RemoveAll(w.dir)
}

func (w *world) say(format string, args ...any) {
	fmt.Printf("%7.1f "+format+"\n", append([]any{time.Since(w.begun).Seconds()}, args...)...)
}

// breaks notes a broken promise.
func (w *world) breaks(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	msg := w.run + ": " + fmt.Sprintf(format, args...)
	w.broken = append(w.broken, msg)
	w.say("BROKEN %s", msg)
	if len(w.broken) >= maxBroken { // more tells nothing
		w.giveUp()
	}
}

func (w *world) figure(format string, args ...any) {
	s := fmt.Sprintf(format, args...)
	w.figures = append(w.figures, s)
	w.say("  %s", s)
}

// pick returns a number below n.
func (w *world) pick(n int) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.rand.IntN(n)
}

// next is a number that no container of this node had yet.
func (w *world) next() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.serial++
	return w.serial
}

// between is a random time.
func (w *world) between(least, most time.Duration) time.Duration {
	return least + time.Duration(w.pick(int(most-least)+1))
}

func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// eventually polls until f returns nil, and returns its last error when that takes longer than limit.
func eventually(ctx context.Context, limit time.Duration, f func() error) error {
	begun := time.Now()
	for {
		err := f()
		if err == nil || ctx.Err() != nil {
			return err
		}
		if time.Since(begun) > limit {
			return fmt.Errorf("not within %v: %w", limit, err)
		}
		pause(ctx, pollStep)
	}
}

func (w *world) supervisorSocket() string {
	return filepath.Join(filepath.Dir(w.node.Socket), "supervisor.sock")
}

// daemonPID is the node's daemon as its file says.
func (w *world) daemonPID() (int, error) {
	b, err := os.ReadFile(filepath.Join(filepath.Dir(w.node.StateDir), "daemon.pid"))
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(b)))
}

// zygotePID is the supervisor's child without a command line.
func zygotePID(supervisor int) (int, error) {
	lists, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", supervisor))
	if err != nil {
		return 0, err
	}
	for _, l := range lists {
		b, _ := os.ReadFile(l)
		for _, f := range strings.Fields(string(b)) {
			cmd, err := os.ReadFile("/proc/" + f + "/cmdline")
			if err == nil && len(cmd) == 0 {
				return strconv.Atoi(f)
			}
		}
	}
	return 0, fmt.Errorf("supervisor %d has no zygote", supervisor)
}

// alive says whether a process is there, if only as a zombie whose threads are still dying and hold its files.
func alive(pid int) bool { return syscall.Kill(pid, 0) == nil }
