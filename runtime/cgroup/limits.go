package cgroup

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// Update sets the limits that r names and leaves the others.
func (g *Group) Update(r *specs.LinuxResources) error {
	if r == nil {
		return nil
	}
	for _, set := range []func(*specs.LinuxResources) error{g.cpu, g.memory, g.kernelMemory, g.pids, g.blockIO, g.hugepages, g.rdma, g.network, g.unified} {
		if err := set(r); err != nil {
			return err
		}
	}
	return nil
}

// files writes several values of one controller.
func files(dir string, kv ...string) error {
	for i := 0; i+1 < len(kv); i += 2 {
		if kv[i+1] == "" {
			continue
		}
		if err := write(dir, kv[i], kv[i+1]); err != nil {
			return fmt.Errorf("cgroup %s: %w", dir, err)
		}
	}
	return nil
}

func itoa[T int64 | uint64](v *T) string {
	if v == nil {
		return ""
	}
	return fmt.Sprint(*v)
}

// max is a v2 limit: -1 means none.
func max(v *int64) string {
	if v != nil && *v < 0 {
		return "max"
	}
	return itoa(v)
}

func (g *Group) cpu(r *specs.LinuxResources) error {
	c := r.CPU
	if c == nil {
		return nil
	}
	if c.Cpus != "" || c.Mems != "" {
		dir, _, ok := g.dir("cpuset")
		if !ok {
			return g.missing("cpuset", "CPU set")
		}
		if err := files(dir, "cpuset.cpus", c.Cpus, "cpuset.mems", c.Mems); err != nil {
			return err
		}
	}
	if err := g.realtime(c); err != nil {
		return err
	}
	if c.Shares == nil && c.Quota == nil && c.Period == nil && c.Burst == nil && c.Idle == nil {
		return nil
	}
	dir, v1, ok := g.dir("cpu")
	if !ok {
		return g.missing("cpu", "CPU")
	}
	if v1 {
		return g.cpuV1(dir, c)
	}
	if err := files(dir, "cpu.idle", itoa(c.Idle)); err != nil {
		return err
	}
	if c.Shares != nil && *c.Shares > 0 {
		// The customary mapping of 2…262144 to 1…10000.
		s := min(*c.Shares, 262144)
		s = 1 + (s-min(s, 2))*9999/262142
		if err := files(dir, "cpu.weight", fmt.Sprint(s)); err != nil {
			return err
		}
	}
	if c.Quota == nil && c.Period == nil {
		return files(dir, "cpu.max.burst", itoa(c.Burst))
	}
	quota, period := "max", "100000"
	if cur, err := os.ReadFile(filepath.Join(dir, "cpu.max")); err == nil {
		if f := strings.Fields(string(cur)); len(f) == 2 {
			quota, period = f[0], f[1]
		}
	}
	if c.Quota != nil {
		quota = "max"
		if *c.Quota > 0 {
			quota = fmt.Sprint(*c.Quota)
		}
	}
	if c.Period != nil && *c.Period > 0 {
		period = fmt.Sprint(*c.Period)
	}
	// A burst above a new quota is refused, and so is a quota below the old burst.
	if err := files(dir, "cpu.max.burst", itoa(c.Burst), "cpu.max", quota+" "+period); err == nil {
		return nil
	}
	return files(dir, "cpu.max", quota+" "+period, "cpu.max.burst", itoa(c.Burst))
}

func (g *Group) cpuV1(dir string, c *specs.LinuxCPU) error {
	shares, period := itoa(c.Shares), itoa(c.Period)
	if shares == "0" {
		shares = ""
	}
	if period == "0" {
		period = ""
	}
	quota := itoa(c.Quota)
	if quota == "0" {
		quota = "-1"
	}
	if err := files(dir, "cpu.idle", itoa(c.Idle), "cpu.shares", shares); err != nil {
		return err
	}
	// A new period may be invalid with the old quota and the other way round, and a burst with either.
	burst := itoa(c.Burst)
	if files(dir, "cpu.cfs_period_us", period, "cpu.cfs_quota_us", quota, "cpu.cfs_burst_us", burst) == nil {
		return nil
	}
	if burst != "" {
		_ = files(dir, "cpu.cfs_burst_us", "0")
	}
	return files(dir, "cpu.cfs_quota_us", quota, "cpu.cfs_period_us", period, "cpu.cfs_burst_us", burst)
}

func (g *Group) memory(r *specs.LinuxResources) error {
	m := r.Memory
	if m == nil || m.Limit == nil && m.Reservation == nil && m.Swap == nil && m.Swappiness == nil && m.DisableOOMKiller == nil {
		return nil
	}
	dir, v1, ok := g.dir("memory")
	if !ok {
		return g.missing("memory", "memory")
	}
	if err := aboveUsage(dir, v1, m); err != nil {
		return err
	}
	if v1 {
		return g.memoryV1(dir, m)
	}
	if m.DisableOOMKiller != nil && *m.DisableOOMKiller {
		return fmt.Errorf("disabling the OOM killer needs cgroup v1: %w", errdefs.ErrInvalidArgument)
	}
	if m.Swappiness != nil {
		return fmt.Errorf("memory swappiness %d needs cgroup v1: %w", *m.Swappiness, errdefs.ErrInvalidArgument)
	}
	swap := m.Swap
	if swap != nil && *swap >= 0 { // the specification counts memory and swap together
		if m.Limit == nil || *m.Limit < 0 || *swap < *m.Limit {
			return fmt.Errorf("memory+swap limit %d needs a smaller memory limit: %w", *swap, errdefs.ErrInvalidArgument)
		}
		only := *swap - *m.Limit
		swap = &only
	}
	if err := files(dir, "memory.max", max(m.Limit), "memory.low", max(m.Reservation)); err != nil {
		return err
	}
	if swap == nil {
		return nil
	}
	if _, err := os.Stat(filepath.Join(dir, "memory.swap.max")); errors.Is(err, os.ErrNotExist) && *swap <= 0 {
		return nil // a kernel without swap accounting
	}
	return files(dir, "memory.swap.max", max(swap))
}

func (g *Group) memoryV1(dir string, m *specs.LinuxMemory) error {
	limit, both := itoa(m.Limit), itoa(m.Swap)
	if both != "" {
		if _, err := os.Stat(filepath.Join(dir, "memory.memsw.limit_in_bytes")); errors.Is(err, os.ErrNotExist) {
			if m.Limit == nil || *m.Swap != *m.Limit && *m.Swap > 0 {
				return g.missing("memory+swap accounting", "swap")
			}
			both = ""
		}
	}
	// The pair must stay ordered: raise the sum first, lower the memory first.
	a := []string{"memory.limit_in_bytes", limit, "memory.memsw.limit_in_bytes", both}
	if err := files(dir, a...); err != nil {
		if err2 := files(dir, a[2], a[3], a[0], a[1]); err2 != nil {
			return err
		}
	}
	oom := ""
	if m.DisableOOMKiller != nil {
		oom = map[bool]string{true: "1", false: "0"}[*m.DisableOOMKiller]
	}
	return files(dir, "memory.soft_limit_in_bytes", itoa(m.Reservation), "memory.swappiness", itoa(m.Swappiness), "memory.oom_control", oom)
}

func (g *Group) pids(r *specs.LinuxResources) error {
	if r.Pids == nil || r.Pids.Limit == nil {
		return nil
	}
	dir, _, ok := g.dir("pids")
	if !ok {
		return g.missing("pids", "process count")
	}
	v := "max"
	if *r.Pids.Limit > 0 {
		v = fmt.Sprint(*r.Pids.Limit)
	}
	return files(dir, "pids.max", v)
}

// The share of the host's processes that a group gets without a limit of its own: what init systems give a service.
const (
	defaultPidsPercent = 15
	minDefaultPids     = 1024
)

// shareOfProcesses is the default limit on this host.
func shareOfProcesses() int64 {
	least := int64(0)
	for _, f := range []string{"pid_max", "threads-max"} {
		b, err := read("/proc/sys/kernel/" + f)
		if err != nil {
			return minDefaultPids
		}
		n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
		if err != nil {
			return minDefaultPids
		}
		if least == 0 || n < least {
			least = n
		}
	}
	if n := least * defaultPidsPercent / 100; n > minDefaultPids {
		return n
	}
	return minDefaultPids
}

func (g *Group) defaultPids() error {
	dir, _, ok := g.dir("pids")
	if !ok {
		return nil
	}
	return files(dir, "pids.max", strconv.FormatInt(g.host.processes, 10))
}

func (g *Group) blockIO(r *specs.LinuxResources) error {
	b := r.BlockIO
	if b == nil {
		return nil
	}
	if err := g.blockIOWeights(b); err != nil {
		return err
	}
	throttles := []struct {
		list     []specs.LinuxThrottleDevice
		old, new string
	}{
		{b.ThrottleReadBpsDevice, "blkio.throttle.read_bps_device", "rbps"}, {b.ThrottleWriteBpsDevice, "blkio.throttle.write_bps_device", "wbps"},
		{b.ThrottleReadIOPSDevice, "blkio.throttle.read_iops_device", "riops"}, {b.ThrottleWriteIOPSDevice, "blkio.throttle.write_iops_device", "wiops"},
	}
	v1dir, isV1 := g.host.v1["blkio"]
	if isV1 {
		v1dir = filepath.Join(v1dir, g.name)
	} else if _, _, ok := g.dir("io"); !ok {
		return g.missing("io", "block I/O")
	}
	if b.Weight != nil && *b.Weight != 0 {
		w := fmt.Sprint(*b.Weight)
		var err error
		if isV1 {
			if err = files(v1dir, "blkio.weight", w); err != nil {
				err = files(v1dir, "blkio.bfq.weight", w)
			}
		} else {
			if err = files(g.v2, "io.bfq.weight", w); err != nil { // without BFQ, the cost model's weights: 10…1000 to 1…10000
				err = files(g.v2, "io.weight", fmt.Sprint(1+(uint64(*b.Weight)-min(uint64(*b.Weight), 10))*9999/990))
			}
		}
		if err != nil {
			return fmt.Errorf("block I/O weight needs the BFQ scheduler: %w", err)
		}
	}
	for _, t := range throttles {
		for _, d := range t.list {
			dev := strconv.FormatInt(d.Major, 10) + ":" + strconv.FormatInt(d.Minor, 10) + " "
			var err error
			if isV1 {
				err = files(v1dir, t.old, dev+fmt.Sprint(d.Rate))
			} else {
				err = files(g.v2, "io.max", dev+t.new+"="+fmt.Sprint(d.Rate))
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// unified sets v2 files by name.
func (g *Group) unified(r *specs.LinuxResources) error {
	for k, v := range r.Unified {
		c, _, ok := strings.Cut(k, ".")
		if !ok || strings.Contains(k, "/") || c == "cgroup" || !g.host.controllers[c] {
			return fmt.Errorf("unified resource %q: not a file of a v2 controller on this host: %w", k, errdefs.ErrInvalidArgument)
		}
		if !slices.Contains(words(g.v2, "cgroup.controllers"), c) {
			return g.missing(c, k)
		}
		if err := files(g.v2, k, v); err != nil {
			return err
		}
	}
	return nil
}

// devices sets the list of allowed devices, in order.
func (g *Group) devices(rules []specs.LinuxDeviceCgroup) error {
	if len(rules) == 0 {
		return nil
	}
	m, ok := g.host.v1["devices"]
	if !ok {
		return g.devicesV2(rules)
	}
	dir := filepath.Join(m, g.name)
	num := func(v *int64) string {
		if v == nil || *v < 0 {
			return "*"
		}
		return fmt.Sprint(*v)
	}
	for _, r := range rules {
		typ, access := r.Type, r.Access
		if typ == "" {
			typ = "a"
		}
		if access == "" {
			access = "rwm"
		}
		file := "devices.deny"
		if r.Allow {
			file = "devices.allow"
		}
		if err := files(dir, file, typ+" "+num(r.Major)+":"+num(r.Minor)+" "+access); err != nil {
			return err
		}
	}
	return nil
}
