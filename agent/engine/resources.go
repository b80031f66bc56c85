package engine

import (
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/moby/api/types/blkiodev"
	"github.com/moby/moby/api/types/container"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"skein/runtime/sandbox"
)

// minMemory is docker's.
const minMemory = 6 << 20

// checkResources refuses limits that cannot hold, with docker's words, and fills in what follows from others. What only cgroup v1 has is
// dropped on v2 with a warning, as docker does.
func checkResources(hc *container.HostConfig) (warnings []string, err error) {
	r := &hc.Resources
	for _, check := range []func(*container.Resources) error{checkMemory, checkCPU, checkCpuset, checkBlockIO, checkUlimits} {
		if err := check(r); err != nil {
			return nil, err
		}
	}
	if hc.OomScoreAdj < -1000 || hc.OomScoreAdj > 1000 {
		return nil, invalid("Invalid value %d, range for oom score adj is [-1000, 1000]", hc.OomScoreAdj)
	}
	if err := checkCgroupParent(hc.CgroupParent); err != nil {
		return nil, err
	}
	if r.CPUCount|r.CPUPercent != 0 || r.IOMaximumIOps|r.IOMaximumBandwidth != 0 {
		return nil, invalid("CpuCount, CpuPercent, IOMaximumIOps and IOMaximumBandwidth are limits of Windows containers")
	}
	if r.MemorySwappiness != nil && *r.MemorySwappiness == -1 {
		r.MemorySwappiness = nil
	}
	if v2 := cgroupVersion() != "1"; v2 && r.MemorySwappiness != nil {
		warnings = append(warnings, "Your kernel does not support memory swappiness capabilities or the cgroup is not mounted. Memory swappiness discarded.")
		r.MemorySwappiness = nil
	} else if disabled := r.OomKillDisable != nil && *r.OomKillDisable; disabled && v2 {
		warnings = append(warnings, "Your kernel does not support OomKillDisable. OomKillDisable discarded.")
		r.OomKillDisable = nil
	} else if disabled && r.Memory == 0 {
		warnings = append(warnings, "OOM killer is disabled for the container, but no memory limit is set, this can result in the system running out of resources.")
	}
	if r.Memory > 0 && r.MemorySwap == 0 {
		r.MemorySwap = 2 * r.Memory // docker's default: as much swap as memory
	}
	return warnings, nil
}

func checkMemory(r *container.Resources) error {
	switch {
	case r.Memory != 0 && r.Memory < minMemory:
		return invalid("Minimum memory limit allowed is 6MB")
	case r.MemorySwap > 0 && r.Memory == 0:
		return invalid("You should always set the Memory limit when using Memoryswap limit, see usage")
	case r.MemorySwap > 0 && r.MemorySwap < r.Memory:
		return invalid("Minimum memoryswap limit should be larger than memory limit, see usage")
	case r.MemorySwap < -1:
		return invalid("invalid memoryswap limit %d: want -1 for none, or bytes", r.MemorySwap)
	case r.MemorySwappiness != nil && (*r.MemorySwappiness < -1 || *r.MemorySwappiness > 100):
		return invalid("Invalid value: %d, valid memory swappiness range is 0-100", *r.MemorySwappiness)
	case r.MemoryReservation != 0 && r.MemoryReservation < minMemory:
		return invalid("Minimum memory reservation allowed is 6MB")
	case r.Memory > 0 && r.Memory < r.MemoryReservation:
		return invalid("Minimum memory limit can not be less than memory reservation limit, see usage")
	}
	return nil
}

func checkCPU(r *container.Resources) error {
	switch {
	case r.NanoCPUs != 0 && r.CPUPeriod != 0:
		return invalid("Conflicting options: Nano CPUs and CPU Period cannot both be set")
	case r.NanoCPUs != 0 && r.CPUQuota != 0:
		return invalid("Conflicting options: Nano CPUs and CPU Quota cannot both be set")
	case r.NanoCPUs < 0 || r.NanoCPUs > int64(runtime.NumCPU())*1e9:
		return invalid("range of CPUs is from 0.01 to %[1]d.00, as there are only %[1]d CPUs available", runtime.NumCPU())
	case r.CPUShares < 0:
		return invalid("invalid CPU shares (%d): value must be a positive integer", r.CPUShares)
	case r.CPUPeriod != 0 && (r.CPUPeriod < 1000 || r.CPUPeriod > 1000000):
		return invalid("CPU cfs period can not be less than 1ms (i.e. 1000) or larger than 1s (i.e. 1000000)")
	case r.CPUQuota > 0 && r.CPUQuota < 1000:
		return invalid("CPU cfs quota can not be less than 1ms (i.e. 1000)")
	case r.CPUQuota < -1:
		return invalid("invalid CPU cfs quota %d: want -1 for none, or microseconds", r.CPUQuota)
	case r.CPURealtimePeriod < 0 || r.CPURealtimeRuntime < 0:
		return invalid("invalid real-time CPU limit: period %d, runtime %d: want microseconds", r.CPURealtimePeriod, r.CPURealtimeRuntime)
	case r.CPURealtimePeriod != 0 && r.CPURealtimeRuntime > r.CPURealtimePeriod:
		return invalid("cpu real-time runtime cannot be higher than cpu real-time period")
	}
	if r.CPURealtimePeriod|r.CPURealtimeRuntime != 0 {
		if _, err := os.Stat(cgroupRoot + "/cpu/cpu.rt_runtime_us"); err != nil {
			return invalid("your kernel does not support CPU real-time scheduler: there is no %s/cpu/cpu.rt_runtime_us", cgroupRoot)
		}
	}
	return nil
}

// checkCpuset compares the sets with what the machine has.
func checkCpuset(r *container.Resources) error {
	for _, x := range []struct{ set, v1, v2, bad, none string }{
		{r.CpusetCpus, "cpuset/cpuset.cpus", "cpuset.cpus.effective", "cpus", "Requested CPUs are not available - requested %s, available: %s"},
		{r.CpusetMems, "cpuset/cpuset.mems", "cpuset.mems.effective", "mems", "Requested memory nodes are not available - requested %s, available: %s"},
	} {
		if x.set == "" {
			continue
		}
		want, err := parseSet(x.set)
		if err != nil {
			return invalid("Invalid value %s for cpuset %s", x.set, x.bad)
		}
		b, err := os.ReadFile(filepath.Join(cgroupRoot, x.v1))
		if errors.Is(err, os.ErrNotExist) {
			b, err = os.ReadFile(filepath.Join(cgroupRoot, x.v2))
		}
		if err != nil {
			return fmt.Errorf("cpuset %s: read what this machine has: %w", x.bad, err)
		}
		text := strings.TrimSpace(string(b))
		have, err := parseSet(text)
		if err != nil {
			return fmt.Errorf("cpuset %s: this machine has %q: %w", x.bad, text, err)
		}
		for n := range want {
			if !have[n] {
				return invalid(x.none, x.set, text)
			}
		}
	}
	return nil
}

// maxSet bounds the numbers of a set.
const maxSet = 8192

// parseSet reads a list such as 0-2,5.
func parseSet(s string) (map[int]bool, error) {
	out := map[int]bool{}
	for _, part := range strings.Split(s, ",") {
		lo, hi, isRange := strings.Cut(part, "-")
		a, err := strconv.ParseUint(lo, 10, 16)
		b := a
		if err == nil && isRange {
			b, err = strconv.ParseUint(hi, 10, 16)
		}
		if err != nil || b < a || b >= maxSet {
			return nil, fmt.Errorf("%q is no list of numbers below %d", s, maxSet)
		}
		for n := a; n <= b; n++ {
			out[int(n)] = true
		}
	}
	return out, nil
}

func checkBlockIO(r *container.Resources) error {
	const weights = "Range of blkio weight is from 10 to 1000"
	if r.BlkioWeight != 0 && (r.BlkioWeight < 10 || r.BlkioWeight > 1000) {
		return invalid(weights)
	}
	for _, d := range r.BlkioWeightDevice {
		if d == nil || d.Weight < 10 || d.Weight > 1000 {
			return invalid(weights)
		}
	}
	_, err := blockIO(r)
	return err
}

// blockIO are the limits of block devices, nil without any. The devices have to be there.
func blockIO(r *container.Resources) (*specs.LinuxBlockIO, error) {
	b := &specs.LinuxBlockIO{}
	if r.BlkioWeight != 0 {
		b.Weight = &r.BlkioWeight
	}
	for _, d := range r.BlkioWeightDevice {
		major, minor, err := deviceNumber(d.Path)
		if err != nil {
			return nil, err
		}
		w := specs.LinuxWeightDevice{Weight: &d.Weight}
		w.Major, w.Minor = major, minor
		b.WeightDevice = append(b.WeightDevice, w)
	}
	for _, x := range []struct {
		from []*blkiodev.ThrottleDevice
		to   *[]specs.LinuxThrottleDevice
	}{{r.BlkioDeviceReadBps, &b.ThrottleReadBpsDevice}, {r.BlkioDeviceWriteBps, &b.ThrottleWriteBpsDevice},
		{r.BlkioDeviceReadIOps, &b.ThrottleReadIOPSDevice}, {r.BlkioDeviceWriteIOps, &b.ThrottleWriteIOPSDevice}} {
		for _, d := range x.from {
			if d == nil {
				return nil, invalid("a block I/O limit names no device")
			}
			major, minor, err := deviceNumber(d.Path)
			if err != nil {
				return nil, err
			}
			t := specs.LinuxThrottleDevice{Rate: d.Rate}
			t.Major, t.Minor = major, minor
			*x.to = append(*x.to, t)
		}
	}
	if b.Weight == nil && len(b.WeightDevice)+len(b.ThrottleReadBpsDevice)+len(b.ThrottleWriteBpsDevice)+len(b.ThrottleReadIOPSDevice)+len(b.ThrottleWriteIOPSDevice) == 0 {
		return nil, nil
	}
	return b, nil
}

func deviceNumber(file string) (major, minor int64, err error) {
	var st unix.Stat_t
	if err := unix.Stat(file, &st); err != nil {
		return 0, 0, invalid("block I/O limit of device %q: %v", file, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return 0, 0, invalid("block I/O limit of device %q: not a block device", file)
	}
	return int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev)), nil
}

// checkUlimits refuses unknown limits and those that this node's daemon may not give.
func checkUlimits(r *container.Resources) error {
	mayRaise := slices.Contains(sandbox.AllCaps(), "CAP_SYS_RESOURCE")
	for _, u := range r.Ulimits {
		if u == nil {
			return invalid("a ulimit has no name")
		}
		n, known := sandbox.RlimitNumber("RLIMIT_" + strings.ToUpper(u.Name))
		switch {
		case !known:
			return invalid("invalid ulimit type: %s", u.Name)
		case u.Soft < -1 || u.Hard < -1:
			return invalid("invalid ulimit %s: %d:%d: want -1 for none, or a number", u.Name, u.Soft, u.Hard)
		case uint64(u.Soft) > uint64(u.Hard):
			return invalid("ulimit soft limit must be less than or equal to hard limit: %d > %d", u.Soft, u.Hard)
		}
		var own unix.Rlimit
		if err := unix.Getrlimit(n, &own); err == nil && !mayRaise && uint64(u.Hard) > own.Max {
			return invalid("ulimit %s: the hard limit %d is above this node's %d: raising it needs CAP_SYS_RESOURCE, which the daemon has not: "+
				"start the daemon with a higher limit", u.Name, u.Hard, own.Max)
		}
	}
	return nil
}

func rlimits(list []*container.Ulimit) []specs.POSIXRlimit {
	var out []specs.POSIXRlimit
	for _, u := range list {
		out = append(out, specs.POSIXRlimit{Type: "RLIMIT_" + strings.ToUpper(u.Name), Soft: uint64(u.Soft), Hard: uint64(u.Hard)})
	}
	return out
}

func checkCgroupParent(parent string) error {
	if parent == "" {
		return nil
	}
	if p := path.Join("/", parent); p == "/" || slices.Contains(strings.Split(parent, "/"), "..") || strings.ContainsAny(parent, "\n\x00") {
		return invalid("invalid cgroup parent %q: want a path below the root of the hierarchies, like /web", parent)
	}
	return nil
}

// cgroupParent is the wished parent as an absolute path.
func cgroupParent(hc *container.HostConfig) string {
	if hc.CgroupParent == "" {
		return ""
	}
	return path.Join("/", hc.CgroupParent)
}

func setResources(spec *specs.Spec, r *container.Resources) error {
	res := spec.Linux.Resources
	if res == nil {
		res = &specs.LinuxResources{}
		spec.Linux.Resources = res
	}
	res.Memory, res.CPU = memoryLimits(r), cpuLimits(r)
	if r.PidsLimit != nil && *r.PidsLimit != 0 {
		res.Pids = &specs.LinuxPids{Limit: r.PidsLimit}
	}
	var err error
	res.BlockIO, err = blockIO(r)
	return err
}

func memoryLimits(r *container.Resources) *specs.LinuxMemory {
	m := &specs.LinuxMemory{}
	if r.Memory > 0 {
		m.Limit = &r.Memory
		swap := r.MemorySwap
		if swap == 0 {
			swap = 2 * r.Memory // a container made before the default was recorded
		}
		m.Swap = &swap
	}
	if r.MemoryReservation > 0 {
		m.Reservation = &r.MemoryReservation
	}
	if r.MemorySwappiness != nil && *r.MemorySwappiness >= 0 {
		s := uint64(*r.MemorySwappiness)
		m.Swappiness = &s
	}
	if r.OomKillDisable != nil && *r.OomKillDisable {
		m.DisableOOMKiller = r.OomKillDisable
	}
	if *m == (specs.LinuxMemory{}) {
		return nil
	}
	return m
}

func cpuLimits(r *container.Resources) *specs.LinuxCPU {
	c := &specs.LinuxCPU{Cpus: r.CpusetCpus, Mems: r.CpusetMems}
	period, quota := uint64(r.CPUPeriod), r.CPUQuota
	if r.NanoCPUs > 0 {
		period, quota = 100000, r.NanoCPUs/10000
	}
	if period != 0 {
		c.Period = &period
	}
	if quota != 0 {
		c.Quota = &quota
	}
	if r.CPUShares != 0 {
		s := uint64(r.CPUShares)
		c.Shares = &s
	}
	if r.CPURealtimePeriod != 0 {
		p := uint64(r.CPURealtimePeriod)
		c.RealtimePeriod = &p
	}
	if r.CPURealtimeRuntime != 0 {
		c.RealtimeRuntime = &r.CPURealtimeRuntime
	}
	if *c == (specs.LinuxCPU{}) {
		return nil
	}
	return c
}

// mergeLimits puts the limits that a request names over those that hold. Those that cannot be changed are refused.
func mergeLimits(to, from *container.Resources) error {
	if err := checkUpdate(to, from); err != nil {
		return err
	}
	for _, x := range []struct{ to, from *int64 }{
		{&to.CPUShares, &from.CPUShares}, {&to.Memory, &from.Memory}, {&to.MemoryReservation, &from.MemoryReservation}, {&to.MemorySwap, &from.MemorySwap},
		{&to.NanoCPUs, &from.NanoCPUs}, {&to.CPUPeriod, &from.CPUPeriod}, {&to.CPUQuota, &from.CPUQuota},
		{&to.CPURealtimePeriod, &from.CPURealtimePeriod}, {&to.CPURealtimeRuntime, &from.CPURealtimeRuntime},
	} {
		if *x.from != 0 {
			*x.to = *x.from
		}
	}
	if from.CpusetCpus != "" {
		to.CpusetCpus = from.CpusetCpus
	}
	if from.CpusetMems != "" {
		to.CpusetMems = from.CpusetMems
	}
	if from.PidsLimit != nil && *from.PidsLimit != 0 { // 0 is what docker's command line sends without a wish
		to.PidsLimit = from.PidsLimit
	}
	if from.BlkioWeight != 0 {
		to.BlkioWeight = from.BlkioWeight
	}
	return nil
}

func checkUpdate(to, from *container.Resources) error {
	fixed := []struct {
		set  bool
		name string
	}{{len(from.Ulimits) > 0, "Ulimits"}, {len(from.Devices) > 0, "Devices"}, {len(from.DeviceRequests) > 0, "DeviceRequests"},
		{len(from.DeviceCgroupRules) > 0, "DeviceCgroupRules"}, {from.CgroupParent != "", "CgroupParent"}, {from.OomKillDisable != nil, "OomKillDisable"},
		{from.MemorySwappiness != nil, "MemorySwappiness"}, {len(from.BlkioWeightDevice) > 0, "BlkioWeightDevice"}, {len(from.BlkioDeviceReadBps) > 0, "BlkioDeviceReadBps"},
		{len(from.BlkioDeviceWriteBps) > 0, "BlkioDeviceWriteBps"}, {len(from.BlkioDeviceReadIOps) > 0, "BlkioDeviceReadIOps"},
		{len(from.BlkioDeviceWriteIOps) > 0, "BlkioDeviceWriteIOps"}}
	for _, f := range fixed {
		if f.set {
			return invalid("%s cannot be updated: make a new container", f.name)
		}
	}
	switch {
	case from.NanoCPUs > 0 && to.CPUPeriod > 0:
		return conflict("Conflicting options: Nano CPUs cannot be updated as CPU Period has already been set")
	case from.NanoCPUs > 0 && to.CPUQuota > 0:
		return conflict("Conflicting options: Nano CPUs cannot be updated as CPU Quota has already been set")
	case from.CPUPeriod > 0 && to.NanoCPUs > 0:
		return conflict("Conflicting options: CPU Period cannot be updated as NanoCPUs has already been set")
	case from.CPUQuota > 0 && to.NanoCPUs > 0:
		return conflict("Conflicting options: CPU Quota cannot be updated as NanoCPUs has already been set")
	case from.Memory > to.MemorySwap && to.MemorySwap > 0 && from.MemorySwap == 0:
		return conflict("Memory limit should be smaller than already set memoryswap limit, update the memoryswap at the same time")
	}
	return nil
}
