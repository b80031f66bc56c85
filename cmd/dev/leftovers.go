package dev

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
)

// Leftovers names what this machine still holds of a cluster: directory, namespaces, devices, mounts, cgroups, processes. Empty after Down.
func Leftovers(name string) []string {
	var out []string
	if _, err := os.Stat(clusterDir(name)); err == nil {
		out = append(out, "directory "+clusterDir(name))
	}
	spaces, _ := filepath.Glob(filepath.Join(netnsDir, "skein-"+name+"-*"))
	for _, s := range spaces {
		out = append(out, "network namespace "+filepath.Base(s))
	}
	if _, err := netlink.LinkByName("skd-" + name); err == nil {
		out = append(out, "device skd-"+name)
	}
	group := filepath.Join(cgroupRoot, name)
	for _, pattern := range []string{"/sys/fs/cgroup" + group, "/sys/fs/cgroup/*" + group} {
		groups, _ := filepath.Glob(pattern)
		for _, g := range groups {
			out = append(out, "cgroup "+g)
		}
	}
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	for _, line := range strings.Split(string(mounts), "\n") {
		if f := strings.Fields(line); len(f) > 4 && (strings.HasPrefix(f[4], clusterDir(name)+"/") || strings.HasPrefix(f[4], filepath.Join(netnsDir, "skein-"+name+"-"))) {
			out = append(out, "mount "+f[4])
		}
	}
	for _, l := range loops(clusterDir(name)) {
		out = append(out, "loop device "+l)
	}
	procs, _ := os.ReadDir("/proc")
	for _, p := range procs {
		pid, err := strconv.Atoi(p.Name())
		if err == nil && inCgroup(pid, group) && !zombie(pid) {
			out = append(out, "process "+p.Name())
		}
	}
	return out
}
