// Package check holds what tests measure a run against: what a machine holds before and after.
package check

import (
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"testing"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
)

// Host is what this machine holds of the kinds of objects that Skein makes, by kind.
type Host map[string][]string

// Take lists them: named network namespaces, links, mounts, cgroups of ours, nft tables, and processes that run or were started by
// a skein binary.
func Take() (Host, error) {
	h := Host{}
	for _, f := range []struct {
		kind string
		list func() ([]string, error)
	}{{"netns", namespaces}, {"link", links}, {"mount", mounts}, {"cgroup", cgroups}, {"nft table", nftTables}, {"process", processes}} {
		l, err := f.list()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", f.kind, err)
		}
		sort.Strings(l)
		h[f.kind] = l
	}
	return h, nil
}

// Diff lists what after holds and before did not.
func Diff(before, after Host) []string {
	var out []string
	for kind, list := range after {
		had := map[string]int{}
		for _, x := range before[kind] {
			had[x]++
		}
		for _, x := range list {
			if had[x] == 0 {
				out = append(out, kind+" "+x)
				continue
			}
			had[x]--
		}
	}
	sort.Strings(out)
	return out
}

// Leaks fails the test at its end when something is left that was not there at the call.
func Leaks(t *testing.T) {
	t.Helper()
	before, err := Take()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		after, err := Take()
		if err != nil {
			t.Error(err)
			return
		}
		for _, l := range Diff(before, after) {
			t.Errorf("left behind: %s", l)
		}
	})
}

func namespaces() ([]string, error) { return names("/run/netns") }

func names(dir string) ([]string, error) {
	d, err := os.ReadDir(dir)
	if os.IsNotExist(err) {
		return nil, nil
	}
	var out []string
	for _, e := range d {
		out = append(out, e.Name())
	}
	return out, err
}

func links() ([]string, error) {
	l, err := netlink.LinkList()
	var out []string
	for _, x := range l {
		out = append(out, x.Attrs().Name)
	}
	return out, err
}

func mounts() ([]string, error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	var out []string
	for _, line := range strings.Split(string(b), "\n") {
		if f := strings.Fields(line); len(f) > 4 {
			out = append(out, f[4])
		}
	}
	return out, nil
}

func cgroups() ([]string, error) {
	var out []string
	roots, err := filepath.Glob("/sys/fs/cgroup/*/skein*")
	if err != nil {
		return nil, err
	}
	more, err := filepath.Glob("/sys/fs/cgroup/skein*")
	if err != nil {
		return nil, err
	}
	for _, r := range append(roots, more...) {
		err := filepath.WalkDir(r, func(p string, d os.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				out = append(out, p)
			}
			return nil // groups go while we walk
		})
		if err != nil {
			return nil, err
		}
	}
	return out, nil
}

func nftTables() ([]string, error) {
	c, err := nftables.New()
	if err != nil {
		return nil, err
	}
	list, err := c.ListTables()
	var out []string
	for _, t := range list {
		out = append(out, t.Name)
	}
	return out, err
}

// processes finds daemons, supervisors, zygotes and what runs in our cgroups, other than this process and its parents.
func processes() ([]string, error) {
	dirs, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	mine := ancestors()
	var out []string
	for _, d := range dirs {
		pid, err := strconv.Atoi(d.Name())
		if err != nil || mine[pid] || dead(pid) {
			continue
		}
		cmd, _ := os.ReadFile("/proc/" + d.Name() + "/cmdline")
		group, _ := os.ReadFile("/proc/" + d.Name() + "/cgroup")
		argv0, _, _ := strings.Cut(string(cmd), "\x00")
		if filepath.Base(argv0) == "skein" || strings.Contains(string(group), ":/skein") {
			out = append(out, d.Name()+" "+strings.ReplaceAll(string(cmd), "\x00", " "))
		}
	}
	return out, nil
}

// dead reports zombies: what was killed and waits for the machine's init to take notice.
func dead(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return true
	}
	f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	return len(f) > 0 && (f[0] == "Z" || f[0] == "X")
}

func ancestors() map[int]bool {
	out := map[int]bool{}
	for pid := os.Getpid(); pid > 1; {
		out[pid] = true
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			break
		}
		f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
		if len(f) < 2 {
			break
		}
		pid, _ = strconv.Atoi(f[1])
	}
	return out
}
