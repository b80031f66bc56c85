package oci

import (
	"fmt"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// checkResources refuses limits that no kernel takes. Whether this host has the controllers is cgroup.Host.Check's question.
func checkResources(s *specs.Spec) error {
	r := s.Linux.Resources
	if r == nil {
		return nil
	}
	for _, f := range []func(*specs.LinuxResources) error{checkMemory, checkCPU, checkBlockIO, checkRare, checkRules} {
		if err := f(r); err != nil {
			return err
		}
	}
	if r.Pids != nil {
		return notBelow("pids.limit", r.Pids.Limit, -1)
	}
	return nil
}

func wrong(field, format string, args ...any) error {
	return invalid("linux.resources."+field, format, args...)
}

// notBelow wants -1, which is no limit, or more.
func notBelow[T int64 | uint64](field string, v *T, least T) error {
	if v != nil && *v < least {
		return wrong(field, "%d: want %d or more", *v, least)
	}
	return nil
}

func checkMemory(r *specs.LinuxResources) error {
	m := r.Memory
	if m == nil {
		return nil
	}
	for _, f := range []struct {
		name  string
		value *int64
	}{{"limit", m.Limit}, {"reservation", m.Reservation}, {"swap", m.Swap}, {"kernel", m.Kernel}, {"kernelTCP", m.KernelTCP}} {
		if err := notBelow("memory."+f.name, f.value, -1); err != nil {
			return err
		}
	}
	limited := m.Limit != nil && *m.Limit > 0
	switch {
	case m.Swappiness != nil && *m.Swappiness > 100:
		return wrong("memory.swappiness", "%d: want 0 to 100", *m.Swappiness)
	case m.Swap != nil && *m.Swap > 0 && limited && *m.Swap < *m.Limit:
		return wrong("memory.swap", "%d: it counts memory and swap together and is below memory.limit %d", *m.Swap, *m.Limit)
	case m.Reservation != nil && limited && *m.Reservation > *m.Limit:
		return wrong("memory.reservation", "%d: above memory.limit %d", *m.Reservation, *m.Limit)
	case m.UseHierarchy != nil && !*m.UseHierarchy:
		return wrong("memory.useHierarchy", "false: kernels account hierarchically only")
	}
	return nil
}

func checkCPU(r *specs.LinuxResources) error {
	c := r.CPU
	if c == nil {
		return nil
	}
	if err := notBelow("cpu.quota", c.Quota, -1); err != nil {
		return err
	}
	if err := notBelow("cpu.realtimeRuntime", c.RealtimeRuntime, -1); err != nil {
		return err
	}
	switch {
	case c.Quota != nil && *c.Quota > 0 && *c.Quota < 1000:
		return wrong("cpu.quota", "%d: want 1000 µs or more", *c.Quota)
	case c.Period != nil && *c.Period != 0 && (*c.Period < 1000 || *c.Period > 1e6):
		return wrong("cpu.period", "%d: want 1000 to 1000000 µs", *c.Period)
	case c.Idle != nil && *c.Idle != 0 && *c.Idle != 1:
		return wrong("cpu.idle", "%d: want 0 or 1", *c.Idle)
	case c.Burst != nil && *c.Burst > 0 && c.Quota != nil && *c.Quota >= 0 && *c.Burst > uint64(*c.Quota):
		return wrong("cpu.burst", "%d: above cpu.quota %d", *c.Burst, *c.Quota)
	}
	for field, list := range map[string]string{"cpu.cpus": c.Cpus, "cpu.mems": c.Mems} {
		if strings.Trim(list, "0123456789,-\n ") != "" {
			return wrong(field, "%q: want numbers and ranges, like 0-3,7", list)
		}
	}
	return nil
}

// weightRange is what the kernel takes as a weight of block I/O; 0 leaves it.
func weightRange(field string, w *uint16) error {
	if w != nil && *w != 0 && (*w < 10 || *w > 1000) {
		return wrong(field, "%d: want 10 to 1000", *w)
	}
	return nil
}

func checkBlockIO(r *specs.LinuxResources) error {
	b := r.BlockIO
	if b == nil {
		return nil
	}
	if err := weightRange("blockIO.weight", b.Weight); err != nil {
		return err
	}
	if err := weightRange("blockIO.leafWeight", b.LeafWeight); err != nil {
		return err
	}
	for i, d := range b.WeightDevice {
		field := fmt.Sprintf("blockIO.weightDevice[%d]", i)
		if d.Major < 0 || d.Minor < 0 {
			return wrong(field, "device number %d:%d", d.Major, d.Minor)
		}
		if err := weightRange(field+".weight", d.Weight); err != nil {
			return err
		}
		if err := weightRange(field+".leafWeight", d.LeafWeight); err != nil {
			return err
		}
	}
	for field, list := range map[string][]specs.LinuxThrottleDevice{"throttleReadBpsDevice": b.ThrottleReadBpsDevice, "throttleWriteBpsDevice": b.ThrottleWriteBpsDevice,
		"throttleReadIOPSDevice": b.ThrottleReadIOPSDevice, "throttleWriteIOPSDevice": b.ThrottleWriteIOPSDevice} {
		for i, d := range list {
			if d.Major < 0 || d.Minor < 0 {
				return wrong(fmt.Sprintf("blockIO.%s[%d]", field, i), "device number %d:%d", d.Major, d.Minor)
			}
		}
	}
	return nil
}

func checkRare(r *specs.LinuxResources) error {
	sizes := map[string]bool{}
	for i, h := range r.HugepageLimits {
		field := fmt.Sprintf("hugepageLimits[%d].pageSize", i)
		n, unit := strings.TrimRight(h.Pagesize, "KMGB"), strings.TrimLeft(h.Pagesize, "0123456789")
		switch {
		case strings.Trim(n, "0123456789") != "" || n == "" || n[0] == '0' || unit != "KB" && unit != "MB" && unit != "GB":
			return wrong(field, "%q: want a size like 64KB, 2MB or 1GB", h.Pagesize)
		case sizes[h.Pagesize]:
			return wrong(field, "%s is listed twice", h.Pagesize)
		}
		sizes[h.Pagesize] = true
	}
	if r.Network != nil {
		for i, p := range r.Network.Priorities {
			if p.Name == "" || strings.ContainsAny(p.Name, " \t\n/") {
				return wrong(fmt.Sprintf("network.priorities[%d].name", i), "%q is no interface", p.Name)
			}
		}
	}
	for dev, l := range r.Rdma {
		switch {
		case dev == "" || strings.ContainsAny(dev, " \t\n"):
			return wrong("rdma", "%q is no device", dev)
		case l.HcaHandles == nil && l.HcaObjects == nil:
			return wrong("rdma["+dev+"]", "neither hcaHandles nor hcaObjects")
		}
	}
	for k, v := range r.Unified {
		c, _, ok := strings.Cut(k, ".")
		switch {
		case !ok || c == "" || c == "cgroup" || strings.ContainsAny(k, "/ \n"):
			return wrong("unified", "%q: want the name of a controller's file", k)
		case v == "" || strings.IndexByte(v, 0) >= 0:
			return wrong("unified["+k+"]", "%q is no value", v)
		}
	}
	return nil
}

func checkRules(r *specs.LinuxResources) error {
	for i, d := range r.Devices {
		field := fmt.Sprintf("devices[%d]", i)
		number := func(n *int64) bool { return n == nil || *n >= -1 && *n < 1<<20 }
		switch {
		case d.Type != "" && d.Type != "a" && d.Type != "b" && d.Type != "c":
			return wrong(field+".type", "%q: want a, b or c", d.Type)
		case strings.Trim(d.Access, "rwm") != "":
			return wrong(field+".access", "%q: want letters of rwm", d.Access)
		case !number(d.Major):
			return wrong(field+".major", "%d: want -1 (any) or a device number", *d.Major)
		case !number(d.Minor):
			return wrong(field+".minor", "%d: want -1 (any) or a device number", *d.Minor)
		}
	}
	return nil
}

// unlimited leaves out what callers set to 0 to say that they ask nothing.
func unlimited(r *specs.LinuxResources) {
	if r == nil {
		return
	}
	if m := r.Memory; m != nil {
		for _, v := range []**int64{&m.Limit, &m.Reservation, &m.Swap} {
			if *v != nil && **v == 0 {
				*v = nil
			}
		}
	}
}
