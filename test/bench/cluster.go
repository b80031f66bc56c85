package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/moby/moby/client"

	"skein/cmd/dev"
	"skein/test/images"
)

const upTime = time.Minute

// bench is a cluster with images and one API client per node.
type bench struct {
	*dev.Cluster
	opts   options
	dir    string
	images *http.Server
	repo   string
	apis   []*client.Client
}

func newBench(ctx context.Context, o options) (b *bench, err error) {
	b = &bench{opts: o}
	defer func() {
		if err != nil {
			_ = b.close()
		}
	}()
	if b.dir, err = os.MkdirTemp("", "skein-bench-"); err != nil {
		return b, err
	}
	b.opts.binary, err = images.BuildAll(ctx, b.dir, o.binary, map[string]string{"noop": "skein/test/bench/noop"})
	return b, err
}

// up starts the cluster.
func (b *bench) up(ctx context.Context) (err error) {
	if err := dev.Down(b.opts.name); err != nil { // of a run that was killed
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, upTime)
	defer cancel()
	begun := time.Now()
	if b.Cluster, err = dev.Up(ctx, dev.Options{Name: b.opts.name, Managers: 3, Binary: b.opts.binary}); err != nil {
		return err
	}
	fmt.Printf("cluster of %d managers is up after %v; kernel objects and %d CPUs are shared with whatever else runs here\n", len(b.Nodes), time.Since(begun).Round(time.Millisecond), runtime.NumCPU())
	for _, n := range b.Nodes {
		api, err := n.Client()
		if err != nil {
			return err
		}
		b.apis = append(b.apis, api)
	}
	return b.serve()
}

// serve offers the same program as noop:v1 and noop:v2.
func (b *bench) serve() (err error) {
	noop := images.Program{Path: "/noop", File: filepath.Join(b.dir, "noop")}
	v1, v2 := noop, noop
	v1.Ref, v1.Env = "noop:v1", []string{"V=v1"}
	v2.Ref, v2.Env = "noop:v2", []string{"V=v2"}
	b.images, b.repo, err = images.Serve(b.HostAddr(), v1, v2)
	return err
}

func (b *bench) image(v string) string { return b.repo + "/noop:" + v }

// close takes everything down.
func (b *bench) close() error {
	var errs []error
	for _, a := range b.apis {
		errs = append(errs, a.Close())
	}
	if b.images != nil {
		errs = append(errs, b.images.Close())
	}
	if b.Cluster != nil && !b.opts.keep {
		errs = append(errs, dev.Down(b.Name))
		for _, x := range dev.Leftovers(b.Name) {
			errs = append(errs, errors.New("left behind: "+x))
		}
	}
	return errors.Join(append(errs, os.RemoveAll(b.dir))...)
}

// group is the cluster's cgroup of a v1 controller, or of v2.
func (b *bench) group(controller string) string {
	v1 := filepath.Join("/sys/fs/cgroup", controller, "skein-dev", b.Name)
	if _, err := os.Stat(v1); err == nil {
		return v1
	}
	return filepath.Join("/sys/fs/cgroup/skein-dev", b.Name)
}

// cpu is what all processes of all nodes have used so far.
func (b *bench) cpu() time.Duration {
	g := b.group("cpuacct")
	if s, err := os.ReadFile(filepath.Join(g, "cpuacct.usage")); err == nil {
		n, _ := strconv.ParseInt(strings.TrimSpace(string(s)), 10, 64)
		return time.Duration(n)
	}
	s, _ := os.ReadFile(filepath.Join(g, "cpu.stat"))
	for l := range strings.Lines(string(s)) {
		if v, ok := strings.CutPrefix(l, "usage_usec "); ok {
			n, _ := strconv.ParseInt(strings.TrimSpace(v), 10, 64)
			return time.Duration(n) * time.Microsecond
		}
	}
	return 0
}

// process is a process of a node.
type process struct {
	node, role string // daemon, supervisor, container
	pid        int
	rss, priv  int64
	cpu        time.Duration
}

// processes looks at everything that runs in the cluster.
func (b *bench) processes() ([]process, error) {
	var out []process
	for _, n := range b.Nodes {
		err := filepath.WalkDir(filepath.Join(b.group("cpuacct"), n.Name), func(p string, d fs.DirEntry, err error) error {
			if err != nil || d.Name() != "cgroup.procs" {
				return nil // groups come and go
			}
			s, _ := os.ReadFile(p)
			for _, f := range strings.Fields(string(s)) {
				pid, _ := strconv.Atoi(f)
				out = append(out, look(n.Name, pid))
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return out, nil
}

func look(node string, pid int) process {
	p := process{node: node, pid: pid, role: "container"}
	cmd, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if args := strings.Split(string(cmd), "\x00"); len(args) > 1 && strings.HasSuffix(args[0], "skein") {
		p.role = args[1]
	} else if len(cmd) == 0 {
		p.role = "zygote"
	}
	p.rss, p.priv = memory(pid)
	if s, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)); err == nil {
		if f := strings.Fields(string(s[strings.LastIndexByte(string(s), ')')+1:])); len(f) > 12 {
			u, _ := strconv.ParseInt(f[11], 10, 64)
			k, _ := strconv.ParseInt(f[12], 10, 64)
			p.cpu = time.Duration(u+k) * 10 * time.Millisecond
		}
	}
	return p
}

func memory(pid int) (rss, priv int64) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return 0, 0
	}
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		name, v, ok := strings.Cut(sc.Text(), ":")
		n, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(v), " kB"), 10, 64)
		switch {
		case !ok || err != nil:
		case name == "Rss":
			rss = n << 10
		case strings.HasPrefix(name, "Private_"):
			priv += n << 10
		}
	}
	return rss, priv
}

// roleCPU sums the CPU of the processes of a role.
func (b *bench) roleCPU() (map[string]time.Duration, error) {
	ps, err := b.processes()
	out := map[string]time.Duration{}
	for _, p := range ps {
		out[p.role] += p.cpu
	}
	return out, err
}

// record starts a profile of the nodes' processes when one is wanted; the returned function ends it.
func (b *bench) record(name string) (stop func(), err error) {
	if b.opts.profile == "" {
		return func() {}, nil
	}
	cmd := exec.Command("perf", "record", "-q", "-a", "-g", "-e", "cpu-clock", "-F", "997", "-G", "skein-dev/"+b.Name, "-o", b.opts.profile+"-"+name+".perf")
	if _, err := os.Stat("/sys/fs/cgroup/perf_event"); err != nil {
		ps, err := b.processes()
		if err != nil {
			return nil, err
		}
		var pids []string
		for _, p := range ps {
			pids = append(pids, strconv.Itoa(p.pid))
		}
		cmd = exec.Command("perf", "record", "-q", "-g", "-e", "cpu-clock", "-F", "997", "-p", strings.Join(pids, ","), "-o", b.opts.profile+"-"+name+".perf")
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("record a profile: %w", err)
	}
	return func() {
		_ = cmd.Process.Signal(os.Interrupt)
		_ = cmd.Wait()
	}, nil
}
