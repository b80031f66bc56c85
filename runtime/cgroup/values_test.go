package cgroup

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// fake is a host of plain files: what the kernel would be told, without the controllers.
func fake(t *testing.T, v2 bool, names ...string) (*Host, string) {
	t.Helper()
	dir := t.TempDir()
	h := &Host{v1: map[string]string{}, controllers: map[string]bool{}}
	if v2 {
		h.v2 = dir
		for _, c := range []string{"cpu", "cpuset", "memory", "pids", "io", "hugetlb", "rdma"} {
			h.controllers[c] = true
		}
		names = append(names, "cgroup.controllers=cpu cpuset memory pids io hugetlb rdma")
	} else {
		for _, c := range v1Controllers() {
			h.v1[c] = dir
		}
	}
	for _, n := range names {
		name, content, _ := strings.Cut(n, "=")
		if err := os.MkdirAll(filepath.Join(dir, "p/c"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "p/c", name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return h, filepath.Join(dir, "p/c")
}

func device(major, minor int64, rate uint64) []specs.LinuxThrottleDevice {
	d := specs.LinuxThrottleDevice{Rate: rate}
	d.Major, d.Minor = major, minor
	return []specs.LinuxThrottleDevice{d}
}

func weight(major, minor int64, w, leaf uint16) []specs.LinuxWeightDevice {
	d := specs.LinuxWeightDevice{Weight: &w}
	if leaf > 0 {
		d.LeafWeight = &leaf
	}
	d.Major, d.Minor = major, minor
	return []specs.LinuxWeightDevice{d}
}

// TestValues: which file is told what, on both versions.
func TestValues(t *testing.T) {
	for name, tc := range map[string]struct {
		v2   bool
		r    specs.LinuxResources
		want []string // file=content after; beforehand files are empty
	}{
		"cpu": {false, specs.LinuxResources{CPU: &specs.LinuxCPU{Shares: ptr(uint64(7)), Quota: ptr(int64(2000)), Period: ptr(uint64(4000)), Burst: ptr(uint64(1000)),
			Idle: ptr(int64(1)), Cpus: "0-1", Mems: "0", RealtimeRuntime: ptr(int64(5)), RealtimePeriod: ptr(uint64(9))}},
			[]string{"cpu.shares=7", "cpu.cfs_quota_us=2000", "cpu.cfs_period_us=4000", "cpu.cfs_burst_us=1000", "cpu.idle=1", "cpuset.cpus=0-1", "cpuset.mems=0",
				"cpu.rt_runtime_us=5", "cpu.rt_period_us=9"}},
		"cpu v2": {true, specs.LinuxResources{CPU: &specs.LinuxCPU{Shares: ptr(uint64(1024)), Quota: ptr(int64(2000)), Period: ptr(uint64(4000)), Burst: ptr(uint64(1000)),
			Idle: ptr(int64(0)), Cpus: "1", Mems: "0"}},
			[]string{"cpu.weight=39", "cpu.max=2000 4000", "cpu.max.burst=1000", "cpu.idle=0", "cpuset.cpus=1", "cpuset.mems=0"}},
		"no quota v2": {true, specs.LinuxResources{CPU: &specs.LinuxCPU{Quota: ptr(int64(-1))}}, []string{"cpu.max=max 100000"}},
		"burst v2":    {true, specs.LinuxResources{CPU: &specs.LinuxCPU{Burst: ptr(uint64(3))}}, []string{"cpu.max.burst=3"}},
		"memory": {false, specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(4096)), Swap: ptr(int64(8192)), Reservation: ptr(int64(1024)),
			Swappiness: ptr(uint64(7)), DisableOOMKiller: ptr(true), KernelTCP: ptr(int64(99))}},
			[]string{"memory.limit_in_bytes=4096", "memory.memsw.limit_in_bytes=8192", "memory.soft_limit_in_bytes=1024", "memory.swappiness=7", "memory.oom_control=1",
				"memory.kmem.tcp.limit_in_bytes=99"}},
		"memory v2": {true, specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(4096)), Swap: ptr(int64(8192)), Reservation: ptr(int64(1024))}},
			[]string{"memory.max=4096", "memory.swap.max=4096", "memory.low=1024"}},
		"no limit v2": {true, specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(-1)), Swap: ptr(int64(-1))}}, []string{"memory.max=max", "memory.swap.max=max"}},
		"pids":        {false, specs.LinuxResources{Pids: &specs.LinuxPids{Limit: ptr(int64(0))}}, []string{"pids.max=max"}},
		"pids v2":     {true, specs.LinuxResources{Pids: &specs.LinuxPids{Limit: ptr(int64(5))}}, []string{"pids.max=5"}},
		"blkio": {false, specs.LinuxResources{BlockIO: &specs.LinuxBlockIO{Weight: ptr(uint16(100)), LeafWeight: ptr(uint16(50)), WeightDevice: weight(8, 1, 70, 20),
			ThrottleReadBpsDevice: device(8, 0, 1), ThrottleWriteBpsDevice: device(8, 0, 2), ThrottleReadIOPSDevice: device(8, 0, 3), ThrottleWriteIOPSDevice: device(8, 0, 4)}},
			[]string{"blkio.weight=100", "blkio.leaf_weight=50", "blkio.weight_device=8:1 70", "blkio.leaf_weight_device=8:1 20", "blkio.throttle.read_bps_device=8:0 1",
				"blkio.throttle.write_bps_device=8:0 2", "blkio.throttle.read_iops_device=8:0 3", "blkio.throttle.write_iops_device=8:0 4"}},
		"bfq": {false, specs.LinuxResources{BlockIO: &specs.LinuxBlockIO{Weight: ptr(uint16(100)), WeightDevice: weight(8, 1, 70, 0)}},
			[]string{"blkio.bfq.weight=100", "blkio.bfq.weight_device=8:1 70"}},
		"io v2": {true, specs.LinuxResources{BlockIO: &specs.LinuxBlockIO{Weight: ptr(uint16(100)), ThrottleWriteIOPSDevice: device(8, 0, 4)}},
			[]string{"io.bfq.weight=100", "io.max=8:0 wiops=4"}},
		"hugetlb":    {false, specs.LinuxResources{HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "2MB", Limit: 5}}}, []string{"hugetlb.2MB.limit_in_bytes=5"}},
		"hugetlb v2": {true, specs.LinuxResources{HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "1GB", Limit: 6}}}, []string{"hugetlb.1GB.max=6"}},
		"rdma":       {false, specs.LinuxResources{Rdma: map[string]specs.LinuxRdma{"mlx0": {HcaHandles: ptr(uint32(3)), HcaObjects: ptr(uint32(4))}}}, []string{"rdma.max=mlx0 hca_handle=3 hca_object=4"}},
		"network": {false, specs.LinuxResources{Network: &specs.LinuxNetwork{ClassID: ptr(uint32(17)), Priorities: []specs.LinuxInterfacePriority{{Name: "eth0", Priority: 9}}}},
			[]string{"net_cls.classid=17", "net_prio.ifpriomap=eth0 9"}},
		"unified v2": {true, specs.LinuxResources{Unified: map[string]string{"memory.high": "1M"}}, []string{"memory.high=1M"}},
		"devices": {false, specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Allow: true, Type: "c", Major: ptr(int64(1)), Access: "rw"}, {Access: "rwm"}}},
			[]string{"devices.allow=c 1:* rw", "devices.deny=a *:* rwm"}},
	} {
		t.Run(name, func(t *testing.T) {
			var empty []string
			for _, f := range tc.want {
				n, _, _ := strings.Cut(f, "=")
				empty = append(empty, n)
			}
			h, dir := fake(t, tc.v2, empty...)
			if err := h.Check(&tc.r); err != nil {
				t.Error(err)
			}
			g, err := h.OpenPath("/p/c")
			if err != nil {
				t.Fatal(err)
			}
			if err := g.Update(&tc.r); err != nil {
				t.Fatal(err)
			}
			if err := g.devices(tc.r.Devices); err != nil {
				t.Fatal(err)
			}
			for _, f := range tc.want {
				n, v, _ := strings.Cut(f, "=")
				if b, err := os.ReadFile(filepath.Join(dir, n)); string(b) != v {
					t.Errorf("%s: %q %v, want %q", n, b, err, v)
				}
			}
		})
	}
}

// TestUnserved: what a host has no controller or file for is refused, with the field's name, and so is a limit below what is in use.
func TestUnserved(t *testing.T) {
	h1, _ := fake(t, false)
	h2, _ := fake(t, true)
	bare := &Host{}
	for field, tc := range map[string]struct {
		h *Host
		r specs.LinuxResources
	}{
		"cpu.realtimeRuntime":     {h2, specs.LinuxResources{CPU: &specs.LinuxCPU{RealtimeRuntime: ptr(int64(1))}}},
		"memory.swappiness":       {h2, specs.LinuxResources{Memory: &specs.LinuxMemory{Swappiness: ptr(uint64(1))}}},
		"memory.disableOOMKiller": {h2, specs.LinuxResources{Memory: &specs.LinuxMemory{DisableOOMKiller: ptr(true)}}},
		"blockIO.leafWeight":      {h2, specs.LinuxResources{BlockIO: &specs.LinuxBlockIO{LeafWeight: ptr(uint16(10))}}},
		"network.classID":         {h2, specs.LinuxResources{Network: &specs.LinuxNetwork{ClassID: ptr(uint32(1))}}},
		"network.priorities":      {h2, specs.LinuxResources{Network: &specs.LinuxNetwork{Priorities: []specs.LinuxInterfacePriority{{Name: "lo"}}}}},
		"unified[memory.high]":    {h1, specs.LinuxResources{Unified: map[string]string{"memory.high": "1"}}},
		"hugepageLimits":          {bare, specs.LinuxResources{HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "2MB"}}}},
		"rdma":                    {bare, specs.LinuxResources{Rdma: map[string]specs.LinuxRdma{"x": {}}}},
		"cpu.idle":                {bare, specs.LinuxResources{CPU: &specs.LinuxCPU{Idle: ptr(int64(1))}}},
		"cpu.cpus":                {bare, specs.LinuxResources{CPU: &specs.LinuxCPU{Cpus: "0"}}},
		"blockIO.weight":          {bare, specs.LinuxResources{BlockIO: &specs.LinuxBlockIO{Weight: ptr(uint16(10))}}},
		"pids.limit":              {bare, specs.LinuxResources{Pids: &specs.LinuxPids{Limit: ptr(int64(1))}}},
	} {
		if err := tc.h.Check(&tc.r); !errdefs.IsFailedPrecondition(err) || !strings.HasPrefix(err.Error(), field+":") {
			t.Errorf("%s: %v", field, err)
		}
	}
	for _, v2 := range []bool{false, true} {
		h, _ := fake(t, v2, "memory.limit_in_bytes", "memory.usage_in_bytes=5000\n", "memory.max", "memory.current=5000\n")
		g, err := h.OpenPath("/p/c")
		if err != nil {
			t.Fatal(err)
		}
		for limit, ok := range map[int64]bool{4096: false, 8192: true, -1: true} {
			err := g.Update(&specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit, CheckBeforeUpdate: ptr(true)}})
			if (err == nil) != ok || !ok && !errdefs.IsFailedPrecondition(err) {
				t.Errorf("v2 %v: limit %d with 5000 in use: %v", v2, limit, err)
			}
		}
	}
}
