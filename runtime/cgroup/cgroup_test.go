package cgroup

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

func host(t *testing.T) (*Host, string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	h, err := Probe()
	if err != nil {
		t.Skip(err)
	}
	parent := fmt.Sprintf("/skein-cgtest-%d/%s", os.Getpid(), t.Name())
	t.Cleanup(func() {
		if err := KillTree(filepath.Dir(parent)); err != nil {
			t.Error(err)
		}
		if err := RemoveTree(filepath.Dir(parent)); err != nil {
			t.Error(err)
		}
		for _, d := range h.roots(filepath.Dir(parent)) {
			if _, err := os.Stat(d); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("%s is left", d)
			}
		}
	})
	return h, parent
}

func ptr[T any](v T) *T { return &v }

func (g *Group) value(t *testing.T, controller, v1, v2 string) string {
	t.Helper()
	dir, isV1, ok := g.dir(controller)
	if !ok {
		t.Skipf("no %s controller", controller)
	}
	file := v2
	if isV1 {
		file = v1
	}
	b, err := os.ReadFile(filepath.Join(dir, file))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

// TestDefaultProcesses: without a word about processes a group may have a share of the host's; -1 is no limit.
func TestDefaultProcesses(t *testing.T) {
	h, parent := host(t)
	for id, c := range map[string]struct {
		r    *specs.LinuxResources
		want string
	}{
		"none": {nil, fmt.Sprint(h.processes)}, "silent": {&specs.LinuxResources{}, fmt.Sprint(h.processes)},
		"free": {&specs.LinuxResources{Pids: &specs.LinuxPids{Limit: ptr(int64(-1))}}, "max"},
	} {
		g, err := h.Create(parent, id, c.r)
		if err != nil {
			t.Fatal(err)
		}
		if _, _, ok := g.dir("pids"); !ok {
			t.Skip("no pids controller")
		}
		if got := g.value(t, "pids", "pids.max", "pids.max"); got != c.want || h.processes < minDefaultPids {
			t.Errorf("%s: limit %s, want %s", id, got, c.want)
		}
	}
}

func TestLimits(t *testing.T) {
	h, parent := host(t)
	g, err := h.Create(parent, "c", &specs.LinuxResources{
		CPU:    &specs.LinuxCPU{Shares: ptr(uint64(512)), Quota: ptr(int64(50000)), Period: ptr(uint64(100000)), Cpus: "0"},
		Memory: &specs.LinuxMemory{Limit: ptr(int64(64 << 20)), Reservation: ptr(int64(32 << 20))},
		Pids:   &specs.LinuxPids{Limit: ptr(int64(99))},
	})
	if err != nil {
		t.Fatal(err)
	}
	if got := g.value(t, "memory", "memory.limit_in_bytes", "memory.max"); got != fmt.Sprint(64<<20) {
		t.Errorf("memory limit %s", got)
	}
	if got := g.value(t, "pids", "pids.max", "pids.max"); got != "99" {
		t.Errorf("pids limit %s", got)
	}
	if got := g.value(t, "cpuset", "cpuset.cpus", "cpuset.cpus"); got != "0" {
		t.Errorf("cpus %s", got)
	}
	// Down and up again, with the pair of memory limits in either order.
	for _, m := range []int64{16 << 20, 256 << 20, 32 << 20} {
		if err := g.Update(&specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(m), Swap: ptr(m)}}); err != nil {
			t.Errorf("limit %d: %v", m, err)
		}
		if got := g.value(t, "memory", "memory.limit_in_bytes", "memory.max"); got != fmt.Sprint(m) {
			t.Errorf("memory limit %s, want %d", got, m)
		}
	}
	if err := g.Update(&specs.LinuxResources{CPU: &specs.LinuxCPU{Quota: ptr(int64(-1))}, Pids: &specs.LinuxPids{Limit: ptr(int64(-1))}}); err != nil {
		t.Error(err)
	}
	if got := g.value(t, "pids", "pids.max", "pids.max"); got != "max" {
		t.Errorf("pids limit %s", got)
	}
	if err := g.Remove(); err != nil {
		t.Error(err)
	}
	if err := g.Remove(); err != nil {
		t.Errorf("second time: %v", err)
	}
}

// groupNames are the groups below parent in a hierarchy.
func groupNames(t *testing.T, dir string) (out []string) {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	for _, e := range list {
		if e.IsDir() {
			out = append(out, e.Name())
		}
	}
	return out
}

// A group from the pool is as one made anew, also when its name is taken, and what waits goes with the pool or with its successor.
func TestPool(t *testing.T) {
	h, parent := host(t)
	if len(h.v1) == 0 {
		t.Skip("no cgroup v1")
	}
	rules := []specs.LinuxDeviceCgroup{{Access: "rwm"}, {Allow: true, Type: "c", Major: ptr(int64(1)), Minor: ptr(int64(3)), Access: "rw"}}
	devices := filepath.Join(h.v1["devices"], parent)
	full := func(p *Pool) {
		t.Helper()
		for limit := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
			p.mu.Lock()
			n := len(p.ready)
			p.mu.Unlock()
			if n == readyGroups {
				return
			}
			if time.Now().After(limit) {
				t.Fatalf("%d groups are ready", n)
			}
		}
	}
	dead, err := h.NewPool(parent, rules)
	if err != nil {
		t.Fatal(err)
	}
	full(dead) // and is never closed
	p, err := h.NewPool(parent, rules)
	if err != nil {
		t.Fatal(err)
	}
	full(p)
	if n := groupNames(t, devices); len(n) != readyGroups {
		t.Errorf("groups of a dead pool are left: %v", n)
	}
	more := append(rules[:len(rules):len(rules)], specs.LinuxDeviceCgroup{Allow: true, Type: "c", Major: ptr(int64(10)), Minor: ptr(int64(200)), Access: "rw"})
	g, err := p.Create("c", &specs.LinuxResources{Devices: more, Pids: &specs.LinuxPids{Limit: ptr(int64(99))}})
	if err != nil {
		t.Fatal(err)
	}
	if got := g.value(t, "pids", "pids.max", "pids.max"); got != "99" {
		t.Errorf("pids limit %s", got)
	}
	anew, err := h.Create(parent, "d", &specs.LinuxResources{Devices: more})
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{"devices.list", "cpuset.cpus", "cpuset.mems"} {
		c, _, _ := strings.Cut(f, ".")
		if a, b := g.value(t, c, f, f), anew.value(t, c, f, f); a != b || a == "" {
			t.Errorf("%s: %q, made anew %q", f, a, b)
		}
	}
	for _, d := range g.Dirs() {
		if _, err := os.Stat(d.Path); err != nil {
			t.Error(err)
		}
	}
	if again, err := p.Create("d", &specs.LinuxResources{Devices: rules}); err != nil || again.value(t, "cpuset", "cpuset.cpus", "") == "" {
		t.Errorf("a group that exists: %v", err)
	}
	if _, err := p.Create("e", &specs.LinuxResources{Devices: rules, Pids: &specs.LinuxPids{Limit: ptr(int64(1 << 60))}}); err == nil {
		t.Error("an impossible limit was accepted")
	}
	for limit, want := range map[int64]string{0: fmt.Sprint(h.processes), -1: "max"} {
		r := &specs.LinuxResources{Devices: rules}
		if limit != 0 {
			r.Pids = &specs.LinuxPids{Limit: &limit}
		}
		full(p)
		g, err := p.Create(fmt.Sprintf("pids%d", limit), r)
		if err != nil {
			t.Fatal(err)
		}
		if got := g.value(t, "pids", "pids.max", "pids.max"); got != want {
			t.Errorf("processes of a ready group: limit %s, want %s", got, want)
		}
		if err := g.Remove(); err != nil {
			t.Error(err)
		}
	}
	free, err := p.Create("f", &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}})
	if err != nil || free.value(t, "devices", "devices.list", "") != "a *:* rwm" {
		t.Errorf("other rules: %v", err)
	}
	for _, x := range []*Group{g, anew, free} {
		if err := x.Remove(); err != nil {
			t.Error(err)
		}
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	for _, dir := range h.roots(parent) {
		if n := groupNames(t, dir); len(n) != 0 {
			t.Errorf("left in %s: %v", dir, n)
		}
	}
}

func TestBadLimitsLeaveNothing(t *testing.T) {
	h, parent := host(t)
	if _, err := h.Create(parent, "c", &specs.LinuxResources{CPU: &specs.LinuxCPU{Cpus: "999"}}); err == nil {
		t.Error("CPU 999 was accepted")
	}
	if _, err := h.Create(parent, "c", &specs.LinuxResources{Unified: map[string]string{"../x": "1"}}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("unified outside: %v", err)
	}
	for _, bad := range []string{"", "/", "x", "/a/../b"} {
		if _, err := h.Open(bad, "c"); !errdefs.IsInvalidArgument(err) {
			t.Errorf("parent %q: %v", bad, err)
		}
		if err := RemoveTree(bad); !errdefs.IsInvalidArgument(err) {
			t.Errorf("remove %q: %v", bad, err)
		}
	}
	for _, bad := range []string{"", ".", "..", "a/b"} {
		if _, err := h.Open(parent, bad); !errdefs.IsInvalidArgument(err) {
			t.Errorf("name %q: %v", bad, err)
		}
	}
	g, _ := h.Open(parent, "c")
	for _, d := range g.Dirs() {
		if _, err := os.Stat(d.Path); err == nil {
			t.Errorf("%s is left", d.Path)
		}
	}
}

func sleeper(t *testing.T) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	return cmd
}

func TestFreezeKillJoin(t *testing.T) {
	h, parent := host(t)
	cmd := sleeper(t)
	if err := Join(parent, cmd.Process.Pid); err != nil {
		t.Fatal(err)
	}
	g := &Group{host: h, name: filepath.Join(parent, nodeLeaf)}
	if h.v2 != "" {
		g.v2 = filepath.Join(h.v2, g.name)
	}
	if !g.Populated() {
		t.Error("not populated")
	}
	if err := g.Freeze(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !g.Frozen() {
		t.Error("not frozen")
	}
	if err := KillTree(parent); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	if ws := cmd.ProcessState.Sys().(syscall.WaitStatus); ws.Signal() != unix.SIGKILL {
		t.Errorf("ended by %v", ws)
	}
}

func TestWeigh(t *testing.T) {
	h, parent := host(t)
	if _, v1 := h.v1["cpu"]; !v1 && !h.controllers["cpu"] {
		t.Skip("no cpu controller")
	}
	if err := Weigh(parent, 10_240); err != nil {
		t.Fatal(err)
	}
	g := &Group{host: h, name: parent}
	want := "10240"
	if mount, v1 := h.v1["cpu"]; v1 {
		g.v1 = []Dir{{"cpu", filepath.Join(mount, parent)}}
	} else {
		g.v2, want = filepath.Join(h.v2, parent), "391"
	}
	if got := g.value(t, "cpu", "cpu.shares", "cpu.weight"); got != want {
		t.Errorf("weight %s, want %s", got, want)
	}
	if err := Weigh("/", 10_240); !errdefs.IsInvalidArgument(err) {
		t.Errorf("weigh everything: %v", err)
	}
}

// TestDeviceProgram attaches the filter of cgroup v2 and tries devices from inside.
func TestDeviceProgram(t *testing.T) {
	h, parent := host(t)
	if h.v2 == "" {
		t.Skip("no cgroup v2")
	}
	g, err := h.Create(parent, "dev", nil)
	if err != nil {
		t.Fatal(err)
	}
	n := ptr[int64]
	if err := g.devicesV2([]specs.LinuxDeviceCgroup{{Access: "rwm"}, {Allow: true, Type: "c", Access: "m"},
		{Allow: true, Type: "c", Major: n(1), Minor: n(3), Access: "rwm"}, {Allow: true, Type: "c", Major: n(1), Minor: n(5), Access: "r"},
		{Allow: true, Type: "c", Major: n(1), Minor: n(8)}, {Type: "c", Major: n(1), Minor: n(8), Access: "w"}}); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/bin/sh", "-c", "for d in null zero random full; do (: <"+"/dev/$d) 2>/dev/null && echo r $d; (: >/dev/$d) 2>/dev/null && echo w $d; done; true")
	dir, err := os.Open(g.v2)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	out, err := cmd.CombinedOutput()
	// The shell opens the redirection inside the group. random: reading allowed, writing denied by the later rule.
	if err != nil || string(out) != "r null\nw null\nr zero\nr random\n" {
		t.Errorf("inside: %q %v", out, err)
	}
}

// TestProcessesInParent: a service's processes are in its own group, as systemd starts them, and give way to groups with limits.
func TestProcessesInParent(t *testing.T) {
	h, parent := host(t)
	if !h.controllers["pids"] {
		t.Skip("no pids controller in cgroup v2")
	}
	cmd := sleeper(t)
	dir := filepath.Join(h.v2, parent)
	if err := errors.Join(os.MkdirAll(dir, 0o755), write(dir, "cgroup.procs", fmt.Sprint(cmd.Process.Pid))); err != nil {
		t.Fatal(err)
	}
	g, err := h.Create(parent, "c", &specs.LinuxResources{Pids: &specs.LinuxPids{Limit: ptr(int64(9))}})
	if err != nil {
		t.Fatal(err)
	}
	if got := g.value(t, "pids", "pids.max", "pids.max"); got != "9" {
		t.Errorf("pids limit %s", got)
	}
	if got := words(dir, nodeLeaf, "cgroup.procs"); len(got) != 1 || got[0] != fmt.Sprint(cmd.Process.Pid) {
		t.Errorf("node leaf holds %v", got)
	}
}

// TestNotDelegated: a group above ours holds processes; containers without limits work, a limit is refused with the reason.
func TestNotDelegated(t *testing.T) {
	h, parent := host(t)
	if !h.controllers["pids"] {
		t.Skip("no pids controller in cgroup v2")
	}
	cmd := sleeper(t)
	dir := filepath.Join(h.v2, parent)
	if err := errors.Join(os.MkdirAll(dir, 0o755), write(dir, "cgroup.procs", fmt.Sprint(cmd.Process.Pid))); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Create(parent+"/ours", "free", &specs.LinuxResources{}); err != nil {
		t.Errorf("without limits: %v", err)
	}
	_, err := h.Create(parent+"/ours", "limited", &specs.LinuxResources{Pids: &specs.LinuxPids{Limit: ptr(int64(9))}})
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), dir+" does not pass it on because it holds processes") {
		t.Errorf("with a limit: %v", err)
	}
	if got := words(dir, "cgroup.procs"); len(got) != 1 {
		t.Errorf("a foreign process was moved: %v", got)
	}
}
