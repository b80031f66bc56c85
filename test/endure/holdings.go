package main

import (
	"bufio"
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/google/nftables"
	"github.com/moby/moby/client"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"skein/cmd/dev"
)

// holdings is what somebody holds of the kernel and the disk, by kind.
type holdings map[string]int

// nodeGroup is the node's cgroup below the root of a hierarchy.
func (w *world) nodeGroup() string { return filepath.Join("/skein-dev", w.opts.name, w.node.Name) }

// hierarchies are the mounted cgroup trees; the root itself where only v2 is mounted there.
func hierarchies() []string {
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.procs"); err == nil {
		return []string{"/sys/fs/cgroup"}
	}
	var out []string
	list, _ := filepath.Glob("/sys/fs/cgroup/*")
	for _, h := range list {
		if _, err := os.Stat(filepath.Join(h, "cgroup.procs")); err == nil {
			out = append(out, h)
		}
	}
	return out
}

// groups are the cgroups below one, as hierarchy and path relative to it.
func groups(group string) map[string][]string {
	out := map[string][]string{}
	for _, h := range hierarchies() {
		root := filepath.Join(h, group)
		_ = filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() && p != root {
				out[filepath.Base(h)] = append(out[filepath.Base(h)], strings.TrimPrefix(p, root+"/"))
			}
			return nil // groups come and go
		})
	}
	return out
}

// processes are all of a cgroup and those below, with the group's path relative to it, in any hierarchy.
func processes(group string) map[int]string {
	out := map[int]string{}
	for _, h := range hierarchies() {
		root := filepath.Join(h, group)
		_ = filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
			if err != nil || d.Name() != "cgroup.procs" {
				return nil
			}
			b, _ := os.ReadFile(p)
			for _, f := range strings.Fields(string(b)) {
				if pid, err := strconv.Atoi(f); err == nil {
					out[pid] = strings.TrimPrefix(strings.TrimPrefix(filepath.Dir(p), root), "/")
				}
			}
			return nil
		})
	}
	return out
}

// namespaces counts the different ones that processes are in.
func namespaces(pids []int) int {
	seen := map[string]bool{}
	for _, pid := range pids {
		list, _ := filepath.Glob(fmt.Sprintf("/proc/%d/ns/*", pid))
		for _, l := range list {
			if to, err := os.Readlink(l); err == nil {
				seen[to] = true
			}
		}
	}
	return len(seen)
}

// entries counts what is in a directory.
func entries(dir string) int {
	list, _ := os.ReadDir(dir)
	return len(list)
}

// process adds what one process holds of descriptors and threads.
func (h holdings) process(name string, pid int) {
	h[name+" descriptors"] = entries(fmt.Sprintf("/proc/%d/fd", pid))
	h[name+" threads"] = entries(fmt.Sprintf("/proc/%d/task", pid))
}

// readyGroup begins the names of groups that a supervisor keeps for containers to come; how many there are changes by itself.
const readyGroup = "_ready-"

// site is where a supervisor lives.
type site struct {
	group, stateDir, socket string
	mounts                  string // when set, only mounts that name it count: the namespace is shared with others
}

// holds looks at what a supervisor and its containers hold.
func (s site) holds() holdings {
	h := holdings{"records": entries(filepath.Join(s.stateDir, "containers"))}
	for hier, list := range groups(s.group) {
		for _, g := range list {
			if !strings.HasPrefix(filepath.Base(g), readyGroup) {
				h["cgroups "+hier]++
			}
		}
	}
	all := processes(s.group)
	h["processes"] = len(all)
	pid, err := dev.Listener(s.socket)
	if err != nil {
		h["supervisor missing"] = 1
		return h
	}
	h.process("supervisor", pid)
	pids := []int{pid}
	for p := range all {
		pids = append(pids, p)
	}
	h["namespaces"] = namespaces(pids)
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", pid))
	for l := range strings.Lines(string(b)) {
		if strings.Contains(l, s.mounts) {
			h["mounts"]++
		}
	}
	return h
}

func (w *world) site() site {
	return site{group: w.nodeGroup(), stateDir: filepath.Join(w.node.StateDir, "supervisor"), socket: w.supervisorSocket()}
}

// holds looks at everything a node holds.
func (w *world) holds(ctx context.Context) (holdings, error) {
	h := w.site().holds()
	pid, err := w.daemonPID()
	if err != nil {
		return nil, err
	}
	h.process("daemon", pid)
	info, err := w.api.Info(ctx, client.InfoOptions{})
	if err != nil {
		return nil, err
	}
	h["daemon goroutines"] = info.Info.NGoroutines
	h["netns files"] = entries(filepath.Join(filepath.Dir(w.node.Socket), "netns"))
	h["snapshots"] = entries(filepath.Join(w.node.StateDir, "images/o/snapshots"))
	h["engine records"] = entries(filepath.Join(w.node.StateDir, "engine/containers"))
	h["volumes"] = entries(filepath.Join(w.node.StateDir, "engine/volumes"))
	return h, w.countNetwork(h)
}

// countNetwork counts devices and packet filter elements of the node.
func (w *world) countNetwork(h holdings) error {
	ns, err := netns.GetFromPath(filepath.Join("/run/netns", w.node.Namespace))
	if err != nil {
		return err
	}
	defer ns.Close()
	hd, err := netlink.NewHandleAt(ns)
	if err != nil {
		return err
	}
	defer hd.Close()
	links, err := hd.LinkList()
	if err != nil {
		return err
	}
	h["links"] = len(links)
	c, err := nftables.New(nftables.WithNetNSFd(int(ns)))
	if err != nil {
		return err
	}
	tables, err := c.ListTables()
	for _, t := range tables {
		sets, _ := c.GetSets(t)
		for _, s := range sets {
			if s.Dynamic {
				continue
			}
			list, _ := c.GetSetElements(s)
			h["nft elements"] += len(list)
		}
	}
	return err
}

// slack is how much more of a kind is no leak: caches and pools of a fixed size, threads of a runtime, clients that come and go.
var slack = map[string]int{"daemon descriptors": 24, "daemon threads": 8, "daemon goroutines": 24, "supervisor descriptors": 24, "supervisor threads": 8}

// growth names what is more than before by more than its slack.
func growth(before, after holdings) []string {
	var out []string
	for k, v := range after {
		if v > before[k]+slack[k] {
			out = append(out, fmt.Sprintf("%s %d → %d", k, before[k], v))
		}
	}
	slices.Sort(out)
	return out
}

// memory is what a process holds, in bytes.
type memory struct{ rss, private int64 }

func memoryOf(pid int) memory {
	var m memory
	f, err := os.Open(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return m
	}
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		name, v, ok := strings.Cut(sc.Text(), ":")
		n, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(v), " kB"), 10, 64)
		switch {
		case !ok || err != nil:
		case name == "Rss":
			m.rss = n << 10
		case strings.HasPrefix(name, "Private_"):
			m.private += n << 10
		}
	}
	return m
}

func mib(n int64) string { return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20)) }
