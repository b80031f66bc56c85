package dev

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/moby/moby/client"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"skein/runtime/cgroup"
)

const joinWait = 30 * time.Second

// Options of a new cluster.
type Options struct {
	Name     string
	Managers int
	Workers  int
	Flags    []string  // further flags of every daemon
	DiskMiB  int       // each node's state on a disk of its own, of this size; 0: on the machine's
	Binary   string    // the skein executable; empty: this one
	IPv6     bool      // nodes have no IPv4 address
	Progress io.Writer // told each step; may be nil
}

func (o Options) validate() error {
	switch {
	case !validCluster.MatchString(o.Name):
		return fmt.Errorf("cluster name %q: want one to six letters and digits, a letter first", o.Name)
	case o.Managers < 1:
		return fmt.Errorf("--managers %d: a cluster needs at least one manager", o.Managers)
	case o.Workers < 0:
		return fmt.Errorf("--workers %d: cannot be negative", o.Workers)
	case o.DiskMiB != 0 && o.DiskMiB < minDisk:
		return fmt.Errorf("--disk %d: want at least %d MiB, or 0 for none", o.DiskMiB, minDisk)
	case o.Managers+o.Workers > maxNodes:
		return fmt.Errorf("%d nodes are more than the %d of a development cluster", o.Managers+o.Workers, maxNodes)
	case os.Geteuid() != 0:
		return errors.New("a development cluster needs root: run it with sudo")
	}
	return nil
}

// Up makes the cluster and returns when all nodes have joined. What was made is removed when it fails.
func Up(ctx context.Context, o Options) (c *Cluster, err error) {
	if err := o.validate(); err != nil {
		return nil, err
	}
	bin := o.Binary
	if bin == "" {
		if bin, err = os.Executable(); err != nil {
			return nil, err
		}
	}
	c, err = claim(o)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, Down(o.Name))
		}
	}()
	// The nodes run a copy: the one given may be a temporary file of `go run`.
	c.Binary = filepath.Join(c.dir(), "skein")
	if err := copyFile(c.Binary, bin); err != nil {
		return nil, fmt.Errorf("copy %s: %w", bin, err)
	}
	for i := range o.Managers + o.Workers {
		role := "manager"
		if i >= o.Managers {
			role = "worker"
		}
		if _, err := c.newNode(role); err != nil {
			return nil, err
		}
	}
	if err := c.save(); err != nil {
		return nil, err
	}
	say(o.Progress, "starting %d nodes", len(c.Nodes))
	g, gctx := errgroup.WithContext(ctx)
	for _, n := range c.Nodes {
		if err := errors.Join(c.buildHost(n), c.buildDisk(n)); err != nil {
			return nil, errors.Join(err, g.Wait())
		}
		g.Go(func() error { return c.startDaemon(gctx, n) })
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	first := c.Nodes[0]
	say(o.Progress, "initialising the cluster on %s (%s)", first.Name, first.Address)
	if err := c.init(ctx, first); err != nil {
		return nil, err
	}
	for _, n := range c.Nodes[1:] {
		say(o.Progress, "joining %s as %s (%s)", n.Name, n.Role, n.Address)
		if err := c.join(ctx, n); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// claim takes the name and a subnet, and makes the fabric. Clusters that start at the same time do so one after the other.
func claim(o Options) (*Cluster, error) {
	if err := os.MkdirAll(Root(), 0o755); err != nil {
		return nil, err
	}
	lock, err := os.Open(Root())
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return nil, fmt.Errorf("lock %s: %w", Root(), err)
	}
	if err := os.Mkdir(clusterDir(o.Name), 0o755); errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("development cluster %s exists: remove it with `skein dev down --name %s`, or take another --name", o.Name, o.Name)
	} else if err != nil {
		return nil, err
	}
	subnet, err := freeSubnet()
	if err != nil {
		return nil, errors.Join(err, Down(o.Name))
	}
	c := &Cluster{Name: o.Name, Subnet: subnet, Flags: o.Flags, DiskMiB: o.DiskMiB, IPv6: o.IPv6}
	if err := c.buildFabric(); err != nil {
		return nil, errors.Join(err, Down(o.Name))
	}
	return c, nil
}

// FreeName returns base, or base with a number, such that no living cluster has the name. What is left of a dead one is removed.
func FreeName(base string) (string, error) {
	for i := 1; i <= 9; i++ {
		name := base
		if i > 1 {
			name += strconv.Itoa(i)
		}
		if _, err := os.Stat(clusterDir(name)); errors.Is(err, fs.ErrNotExist) {
			return name, nil
		}
		c, err := Load(name)
		if err != nil || !slices.ContainsFunc(c.Nodes, func(n *Node) bool { return n.PID != 0 }) {
			if err == nil && len(c.Nodes) > 0 {
				return name, Down(name)
			}
			continue // just being made by somebody
		}
	}
	return "", fmt.Errorf("clusters %s to %s9 exist: see `skein dev ls`, and remove some with `skein dev down --name NAME`", base, base)
}

func say(w io.Writer, format string, args ...any) {
	if w != nil {
		fmt.Fprintf(w, format+"\n", args...)
	}
}

// Client speaks to a node's API.
func (n *Node) Client() (*client.Client, error) {
	return client.New(client.WithHost("unix://" + n.Socket))
}

func (c *Cluster) init(ctx context.Context, n *Node) error {
	api, err := n.Client()
	if err != nil {
		return err
	}
	defer api.Close()
	ctx, cancel := context.WithTimeout(ctx, joinWait)
	defer cancel()
	if _, err := api.SwarmInit(ctx, client.SwarmInitOptions{ListenAddr: "0.0.0.0:2377", AdvertiseAddr: n.Address}); err != nil {
		return fmt.Errorf("initialise the cluster on %s: %w", n.Name, err)
	}
	return nil
}

// join brings a running node into the cluster through any living manager.
func (c *Cluster) join(ctx context.Context, n *Node) error {
	ctx, cancel := context.WithTimeout(ctx, joinWait)
	defer cancel()
	token, remotes, err := c.token(ctx, n)
	if err != nil {
		return err
	}
	api, err := n.Client()
	if err != nil {
		return err
	}
	defer api.Close()
	_, err = api.SwarmJoin(ctx, client.SwarmJoinOptions{ListenAddr: "0.0.0.0:2377", AdvertiseAddr: n.Address, RemoteAddrs: remotes, JoinToken: token})
	if err != nil {
		return fmt.Errorf("join %s: %w", n.Name, err)
	}
	return nil
}

func (c *Cluster) token(ctx context.Context, joining *Node) (string, []string, error) {
	var token string
	var remotes []string
	var last error
	for _, m := range c.Nodes {
		if m.Role != "manager" || m == joining || m.PID == 0 {
			continue
		}
		if token == "" {
			api, err := m.Client()
			if err != nil {
				return "", nil, err
			}
			res, err := api.SwarmInspect(ctx, client.SwarmInspectOptions{})
			api.Close()
			if err != nil {
				last = err
				continue
			}
			token = res.Swarm.JoinTokens.Worker
			if joining.Role == "manager" {
				token = res.Swarm.JoinTokens.Manager
			}
		}
		remotes = append(remotes, net.JoinHostPort(m.Address, "2377"))
	}
	if token == "" {
		return "", nil, fmt.Errorf("no manager of cluster %s answers: %w", c.Name, last)
	}
	return token, remotes, nil
}

// Add makes one more node of the given role.
func (c *Cluster) Add(ctx context.Context, role string) (*Node, error) {
	n, err := c.newNode(role)
	if err != nil {
		return nil, err
	}
	if err := c.save(); err != nil {
		return nil, err
	}
	if err := errors.Join(c.buildHost(n), c.buildDisk(n)); err != nil {
		return nil, err
	}
	if err := c.startDaemon(ctx, n); err != nil {
		return nil, err
	}
	return n, c.join(ctx, n)
}

// Join brings a running node that is in no cluster into this one, in the role it was made with.
func (c *Cluster) Join(ctx context.Context, n *Node) error { return c.join(ctx, n) }

// Kill ends everything of a node with SIGKILL; Start runs its daemon again.
func (c *Cluster) Kill(n *Node) error { return c.kill(n) }

// Start runs the daemon of a node that has none. Containers that still live are adopted.
func (c *Cluster) Start(ctx context.Context, n *Node) error { return c.startDaemon(ctx, n) }

// Cut takes the node's link down, Heal brings it up again.
func (c *Cluster) Cut(n *Node) error { return c.setCable(n, false) }

// Heal brings a cut link up again.
func (c *Cluster) Heal(n *Node) error { return c.setCable(n, true) }

// Down removes everything of a cluster, whatever state it is in. Idempotent.
func Down(name string) error {
	if !validCluster.MatchString(name) {
		return fmt.Errorf("cluster name %q: want one to six letters and digits, a letter first", name)
	}
	var errs []error
	group := filepath.Join(cgroupRoot, name)
	if err := cgroup.KillTree(group); err != nil {
		errs = append(errs, err)
	}
	if err := cgroup.RemoveTree(group); err != nil {
		errs = append(errs, err)
	}
	_ = cgroup.RemoveEmpty(cgroupRoot) // fails while another cluster has groups there
	if err := removeDevice("skd-" + name); err != nil {
		errs = append(errs, err)
	}
	spaces, err := os.ReadDir(netnsDir)
	if err == nil {
		for _, s := range spaces {
			if strings.HasPrefix(s.Name(), "skein-"+name+"-") {
				errs = append(errs, removeNetns(s.Name()))
			}
		}
	}
	errs = append(errs, removeDir(clusterDir(name)))
	_ = os.Remove(Root()) // when empty
	return errors.Join(errs...)
}

// removeDir deletes a cluster's directory after whatever may still be mounted below it was unmounted, so that nothing foreign is
// walked into.
func removeDir(dir string) error {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	for _, line := range strings.Split(string(b), "\n") {
		f := strings.Fields(line)
		if len(f) > 4 && strings.HasPrefix(f[4], dir+"/") {
			_ = unix.Unmount(f[4], unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		}
	}
	return os.RemoveAll(dir)
}

func copyFile(dst, src string) error {
	in, err := os.Open(src)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(dst, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}
