package engine

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os"
	"path"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// statsEvery is the distance of two measurements of a stream, docker's.
const statsEvery = time.Second

// ContainerStats measures a container: once, or every second until ctx is done or the container is removed. Of one that does not run
// the figures are zero.
func (e *Engine) ContainerStats(ctx context.Context, ref string, stream, oneShot bool, emit func(container.StatsResponse) error) error {
	c, err := e.find(ref)
	if err != nil {
		return err
	}
	last := e.measure(c)
	if oneShot || !stream && !c.snapshot().State.active() {
		return emit(last)
	}
	tick := time.NewTicker(statsEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
		if _, _, removed, _ := c.watch(); removed {
			return nil
		}
		now := e.measure(c)
		now.PreRead, now.PreCPUStats = last.Read, last.CPUStats
		if err := emit(now); err != nil || !stream {
			return err
		}
		last = now
	}
}

func (e *Engine) measure(c *entry) container.StatsResponse {
	r := c.snapshot()
	s := container.StatsResponse{ID: r.ID, Name: "/" + r.Name, OSType: "linux", Read: time.Now().UTC()}
	if !r.State.active() {
		return s
	}
	g := groupsOf(r.State.Pid)
	s.CPUStats = g.cpu()
	s.MemoryStats = g.memory()
	s.PidsStats = g.pids()
	s.BlkioStats.IoServiceBytesRecursive = g.blkio()
	if !r.HostConfig.NetworkMode.IsHost() {
		s.Networks = interfaces(r.State.Pid)
	}
	return s
}

// groups are the directories of a process's cgroups by controller; "" is the tree of version 2.
type groups map[string]string

const cgroupRoot = "/sys/fs/cgroup"

func groupsOf(pid int) groups {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return nil // it ended: nothing to measure
	}
	g := groups{}
	for line := range strings.Lines(string(b)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(f) != 3 {
			continue
		}
		for _, ctl := range strings.Split(f[1], ",") {
			dir := path.Join(cgroupRoot, f[1], f[2])
			if ctl == "" {
				if dir = path.Join(cgroupRoot, f[2]); cgroupVersion() == "1" {
					dir = path.Join(cgroupRoot, "unified", f[2])
				}
			} else if _, err := os.Stat(dir); err != nil {
				dir = path.Join(cgroupRoot, ctl, f[2])
			}
			g[ctl] = dir
		}
	}
	return g
}

// text reads a file of a controller, or of the tree of version 2.
func (g groups) text(controller, v1, v2 string) string {
	dir, file := g[controller], v1
	if dir == "" {
		dir, file = g[""], v2
	}
	if dir == "" || file == "" {
		return ""
	}
	b, _ := os.ReadFile(path.Join(dir, file)) // what this kernel does not count is zero
	return strings.TrimSpace(string(b))
}

func (g groups) number(controller, v1, v2 string) uint64 {
	n, _ := strconv.ParseUint(g.text(controller, v1, v2), 10, 64) // "max" is none
	return n
}

// table reads "key value" lines.
func (g groups) table(controller, v1, v2 string) map[string]uint64 {
	out := map[string]uint64{}
	for line := range strings.Lines(g.text(controller, v1, v2)) {
		if k, v, ok := strings.Cut(strings.TrimSpace(line), " "); ok {
			if n, err := strconv.ParseUint(v, 10, 64); err == nil {
				out[k] = n
			}
		}
	}
	return out
}

func (g groups) cpu() container.CPUStats {
	out := container.CPUStats{OnlineCPUs: uint32(runtime.NumCPU()), SystemUsage: systemCPU()}
	const tick = uint64(time.Second) / clockTick
	if g["cpuacct"] != "" {
		out.CPUUsage.TotalUsage = g.number("cpuacct", "cpuacct.usage", "")
		t := g.table("cpuacct", "cpuacct.stat", "")
		out.CPUUsage.UsageInUsermode, out.CPUUsage.UsageInKernelmode = t["user"]*tick, t["system"]*tick
	} else {
		t := g.table("cpu", "", "cpu.stat")
		out.CPUUsage.TotalUsage, out.CPUUsage.UsageInUsermode, out.CPUUsage.UsageInKernelmode = t["usage_usec"]*1000, t["user_usec"]*1000, t["system_usec"]*1000
	}
	t := g.table("cpu", "cpu.stat", "cpu.stat")
	out.ThrottlingData = container.ThrottlingData{Periods: t["nr_periods"], ThrottledPeriods: t["nr_throttled"], ThrottledTime: t["throttled_time"] + t["throttled_usec"]*1000}
	return out
}

func (g groups) memory() container.MemoryStats {
	out := container.MemoryStats{
		Usage: g.number("memory", "memory.usage_in_bytes", "memory.current"), MaxUsage: g.number("memory", "memory.max_usage_in_bytes", "memory.peak"),
		Limit: g.number("memory", "memory.limit_in_bytes", "memory.max"), Stats: g.table("memory", "memory.stat", "memory.stat"),
		Failcnt: g.number("memory", "memory.failcnt", ""),
	}
	if all := uint64(memTotal()); out.Limit == 0 || out.Limit > all {
		out.Limit = all
	}
	return out
}

func (g groups) pids() container.PidsStats {
	return container.PidsStats{Current: g.number("pids", "pids.current", "pids.current"), Limit: g.number("pids", "pids.max", "pids.max")}
}

func (g groups) blkio() []container.BlkioStatEntry {
	out := []container.BlkioStatEntry{}
	device := func(s string) (major, minor uint64, ok bool) {
		a, b, ok := strings.Cut(s, ":")
		major, err := strconv.ParseUint(a, 10, 64)
		minor, err2 := strconv.ParseUint(b, 10, 64)
		return major, minor, ok && err == nil && err2 == nil
	}
	for line := range strings.Lines(g.text("blkio", "blkio.throttle.io_service_bytes", "io.stat")) {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		major, minor, ok := device(f[0])
		if !ok {
			continue
		}
		if len(f) == 3 && (f[1] == "Read" || f[1] == "Write") {
			n, _ := strconv.ParseUint(f[2], 10, 64)
			out = append(out, container.BlkioStatEntry{Major: major, Minor: minor, Op: strings.ToLower(f[1]), Value: n})
			continue
		}
		for _, kv := range f[1:] {
			k, v, _ := strings.Cut(kv, "=")
			if n, err := strconv.ParseUint(v, 10, 64); err == nil && (k == "rbytes" || k == "wbytes") {
				out = append(out, container.BlkioStatEntry{Major: major, Minor: minor, Op: map[string]string{"rbytes": "read", "wbytes": "write"}[k], Value: n})
			}
		}
	}
	return out
}

// systemCPU is the time all processors of the machine were in use or idle, in nanoseconds.
func systemCPU() uint64 {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0
	}
	line, _, _ := strings.Cut(string(b), "\n")
	var sum uint64
	for i, f := range strings.Fields(line) {
		if i == 0 || i > 8 { // guest time is part of user time
			continue
		}
		n, _ := strconv.ParseUint(f, 10, 64)
		sum += n
	}
	return sum * uint64(time.Second) / clockTick
}

// interfaces are the counters of a container's devices, the loopback aside.
func interfaces(pid int) map[string]container.NetworkStats {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/dev", pid))
	if err != nil {
		return nil
	}
	out := map[string]container.NetworkStats{}
	for sc := bufio.NewScanner(bytes.NewReader(b)); sc.Scan(); {
		name, rest, ok := strings.Cut(strings.TrimSpace(sc.Text()), ":")
		f := strings.Fields(rest)
		if !ok || name == "lo" || len(f) < 12 {
			continue
		}
		n := func(i int) uint64 { v, _ := strconv.ParseUint(f[i], 10, 64); return v }
		out[name] = container.NetworkStats{
			RxBytes: n(0), RxPackets: n(1), RxErrors: n(2), RxDropped: n(3), TxBytes: n(8), TxPackets: n(9), TxErrors: n(10), TxDropped: n(11),
		}
	}
	return out
}

// ContainerUpdate changes limits and the restart policy; what is not named stays.
func (e *Engine) ContainerUpdate(ctx context.Context, ref string, req container.UpdateConfig) (container.UpdateResponse, error) {
	c, err := e.find(ref)
	if err != nil {
		return container.UpdateResponse{}, err
	}
	if err := c.lock(); err != nil {
		return container.UpdateResponse{}, err
	}
	defer c.op.Unlock()
	r := c.snapshot()
	hc := *r.HostConfig
	if req.RestartPolicy.Name != "" {
		if err := container.ValidateRestartPolicy(req.RestartPolicy); err != nil {
			return container.UpdateResponse{}, invalid("%v", err)
		}
		if hc.AutoRemove && !req.RestartPolicy.IsNone() {
			return container.UpdateResponse{}, conflict("Restart policy cannot be updated because AutoRemove is enabled for the container")
		}
		hc.RestartPolicy = req.RestartPolicy
	}
	if err := mergeLimits(&hc.Resources, &req.Resources); err != nil {
		return container.UpdateResponse{}, err
	}
	warnings, err := e.checkHostConfig(&hc)
	if err != nil {
		return container.UpdateResponse{}, err
	}
	if r.State.active() {
		spec := &specs.Spec{Linux: &specs.Linux{}}
		if err := setResources(spec, &hc.Resources); err != nil {
			return container.UpdateResponse{}, err
		}
		if err := e.cfg.Supervisor.Update(ctx, r.ID, spec.Linux.Resources); err != nil {
			return container.UpdateResponse{}, fmt.Errorf("Cannot update container %s: %w", r.ID, err)
		}
	}
	if err := e.update(c, func(r *record) { r.HostConfig = &hc }); err != nil {
		return container.UpdateResponse{}, err
	}
	e.emit(c.snapshot(), events.ActionUpdate, nil)
	return container.UpdateResponse{Warnings: warnings}, nil
}
