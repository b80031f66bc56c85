package nemesis

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/moby/moby/client"

	"skein/cmd/dev"
	"skein/test/images"
)

// Options of a rig.
type Options struct {
	Name     string
	Managers int
	Workers  int
	DiskMiB  int      // a disk for every node; 0: none
	Binary   string   // the skein executable; empty: it is built
	Flags    []string // of the daemons
}

// Rig is a cluster under test.
type Rig struct {
	*dev.Cluster
	Image string // a program that sleeps until SIGTERM
	Begun time.Time

	dir    string
	images *http.Server

	mu      sync.Mutex // orders starts and kills
	clients map[string]*client.Client
	out     sync.Mutex
}

// NewRig builds what is needed, removes what an earlier run left, and starts a cluster.
func NewRig(ctx context.Context, o Options) (*Rig, error) {
	r := &Rig{Begun: time.Now(), clients: map[string]*client.Client{}}
	if err := r.build(ctx, o.Binary); err != nil {
		return nil, err
	}
	if err := dev.Down(o.Name); err != nil {
		return nil, err
	}
	uctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	var err error
	r.Cluster, err = dev.Up(uctx, dev.Options{Name: o.Name, Managers: o.Managers, Workers: o.Workers, DiskMiB: o.DiskMiB, Flags: o.Flags,
		Binary: filepath.Join(r.dir, "skein")})
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(r.dir))
	}
	for _, n := range r.Nodes {
		if r.clients[n.Name], err = n.Client(); err != nil {
			return nil, errors.Join(err, r.Close())
		}
	}
	if err := r.serve(); err != nil {
		return nil, errors.Join(err, r.Close())
	}
	return r, nil
}

func (r *Rig) build(ctx context.Context, binary string) (err error) {
	if r.dir, err = os.MkdirTemp("", "skein-rig-"); err != nil {
		return err
	}
	programs := map[string]string{"noop": "skein/test/bench/noop"}
	if binary == "" {
		programs["skein"] = "skein/cmd/skein"
	} else if err := os.Symlink(binary, filepath.Join(r.dir, "skein")); err != nil {
		return err
	}
	for out, pkg := range programs {
		if err := images.Build(ctx, filepath.Join(r.dir, out), pkg); err != nil {
			return errors.Join(err, os.RemoveAll(r.dir))
		}
	}
	return nil
}

func (r *Rig) serve() (err error) {
	var repo string
	r.images, repo, err = images.Serve(r.HostAddr(), images.Program{Ref: "noop:v1", Path: "/noop", File: filepath.Join(r.dir, "noop")})
	r.Image = repo + "/noop:v1"
	return err
}

// Close takes the cluster down and says what is left of it.
func (r *Rig) Close() error {
	if r.images != nil {
		_ = r.images.Close()
	}
	for _, c := range r.clients {
		if c != nil {
			_ = c.Close()
		}
	}
	err := errors.Join(dev.Down(r.Name), os.RemoveAll(r.dir))
	var left []string
	for begun := time.Now(); time.Since(begun) < 5*time.Second; time.Sleep(100 * time.Millisecond) { // loop devices free themselves a little later
		if left = dev.Leftovers(r.Name); len(left) == 0 {
			return err
		}
	}
	return errors.Join(err, fmt.Errorf("left behind: %v", left))
}

// Say prints a line with the time since the start.
func (r *Rig) Say(format string, args ...any) {
	r.out.Lock()
	defer r.out.Unlock()
	fmt.Printf("%7.1f "+format+"\n", append([]any{time.Since(r.Begun).Seconds()}, args...)...)
}

// Client speaks to a node's API.
func (r *Rig) Client(n *dev.Node) *client.Client { return r.clients[n.Name] }

// Managers are the nodes that were made as such.
func (r *Rig) Managers() []*dev.Node {
	var out []*dev.Node
	for _, n := range r.Nodes {
		if n.Role == "manager" {
			out = append(out, n)
		}
	}
	return out
}

// NodeOf finds a node by its host name.
func (r *Rig) NodeOf(host string) *dev.Node {
	for _, n := range r.Nodes {
		if host == r.Name+"-"+n.Name {
			return n
		}
	}
	return nil
}

// Leader asks all managers at once who leads; the first answer counts.
func (r *Rig) Leader(ctx context.Context, limit time.Duration) (*dev.Node, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	list := r.Managers()
	found := make(chan *dev.Node, len(list))
	for _, m := range list {
		go func() {
			for ctx.Err() == nil {
				res, err := r.Client(m).NodeList(ctx, client.NodeListOptions{})
				for _, x := range res.Items {
					if err == nil && x.ManagerStatus != nil && x.ManagerStatus.Leader {
						found <- r.NodeOf(x.Description.Hostname)
						return
					}
				}
				Sleep(ctx, 20*time.Millisecond)
			}
		}()
	}
	select {
	case n := <-found:
		return n, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("nobody says who leads within %v", limit)
	}
}

// KillDaemon ends a node's daemon with SIGKILL; its containers live on.
func (r *Rig) KillDaemon(n *dev.Node) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if n.PID == 0 {
		return nil
	}
	pid := n.PID
	n.PID = 0
	return syscall.Kill(pid, syscall.SIGKILL)
}

// Signal sends the node's daemon a signal; one that does not run gets none.
func (r *Rig) Signal(n *dev.Node, s syscall.Signal) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if n.PID == 0 {
		return nil
	}
	return syscall.Kill(n.PID, s)
}

// StartDaemon starts the daemon of a node that has none, once the old one is gone, and waits until it answers.
func (r *Rig) StartDaemon(ctx context.Context, n *dev.Node) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	var err error
	for range 100 {
		r.mu.Lock()
		running := n.PID != 0
		r.mu.Unlock()
		if running {
			return nil
		}
		if err = r.Start(ctx, n); err == nil || n.PID != 0 {
			return nil // n.PID: somebody else started it meanwhile
		}
		Sleep(ctx, 50*time.Millisecond)
	}
	return err
}

// Remount kills everything of a node and mounts its disk anew.
func (r *Rig) Remount(n *dev.Node) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return errors.Join(r.Kill(n), r.DetachDisk(n), r.AttachDisk(n))
}

// Sleep waits, unless ctx ends earlier.
func Sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
