package main

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"skein/cmd/dev"
)

// holdings counts what each node holds: devices, nft elements, network namespaces, mounts, cgroups, descriptors, directories.
func (w *world) holdings() map[string]int {
	out := map[string]int{}
	for _, n := range w.living() {
		add := func(what string, count int) { out[n.Name+" "+what] += count }
		countNetwork(n, add)
		group := filepath.Join("/skein-dev", w.Name, n.Name)
		for _, h := range []string{"memory", "unified", "cpu"} {
			countDirs(filepath.Join("/sys/fs/cgroup", h, group), 9, func(string, int) { add("cgroups "+h, 1) })
		}
		if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", n.PID)); err == nil {
			add("mounts", strings.Count(string(b), "\n"))
		}
		if list, err := os.ReadDir(filepath.Join(filepath.Dir(n.Socket), "netns")); err == nil {
			add("netns", len(list))
		}
		countDirs(n.StateDir, 3, func(dir string, entries int) {
			if strings.HasSuffix(dir, "/engine") || strings.Contains(dir, "blobs") || strings.Contains(dir, "raft") || strings.Contains(dir, "content") {
				return
			}
			add("entries below "+strings.TrimPrefix(dir, n.StateDir), entries)
		})
		if pid, err := supervisorPID(n); err == nil {
			list, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
			add("supervisor descriptors", len(list)/8*8) // clients come and go
		}
	}
	return out
}

func countNetwork(n *dev.Node, add func(string, int)) {
	ns, err := netns.GetFromPath(filepath.Join("/run/netns", n.Namespace))
	if err != nil {
		return
	}
	defer ns.Close()
	if h, err := netlink.NewHandleAt(ns); err == nil {
		links, _ := h.LinkList()
		add("devices", len(links))
		h.Close()
	}
	c, err := nftables.New(nftables.WithNetNSFd(int(ns)))
	if err != nil {
		return
	}
	tables, _ := c.ListTables()
	for _, t := range tables {
		sets, _ := c.GetSets(t)
		for _, s := range sets {
			if s.Dynamic {
				continue
			}
			elements, _ := c.GetSetElements(s)
			add("nft "+t.Name+" "+s.Name, len(elements))
		}
	}
}

// countDirs calls f for a directory and those below it, down to depth.
func countDirs(dir string, depth int, f func(dir string, entries int)) {
	list, err := os.ReadDir(dir)
	if err != nil {
		return
	}
	f(dir, len(list))
	if depth == 0 {
		return
	}
	for _, e := range list {
		if e.Type()&fs.ModeDir != 0 {
			countDirs(filepath.Join(dir, e.Name()), depth-1, f)
		}
	}
}

// growth is what is more now than before. Directories that came or went whole are found by their parents.
func growth(before, after map[string]int) map[string]string {
	out := map[string]string{}
	for k, v := range after {
		if b, ok := before[k]; v > b && (ok || !strings.Contains(k, "entries below")) {
			out[k] = fmt.Sprintf("%d → %d", b, v)
		}
	}
	return out
}
