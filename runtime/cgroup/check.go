package cgroup

import (
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// Check refuses limits for which this host has no controller; errors name the field below linux.resources. It makes nothing. Whether a
// v2 parent passes its controllers on is found out when the group is made.
func (h *Host) Check(r *specs.LinuxResources) error {
	if r == nil {
		return nil
	}
	for _, n := range needs(r) {
		_, v1 := h.v1[n.v1]
		if n.v1 != "" && v1 || n.v2 != "" && h.controllers[n.v2] {
			continue
		}
		names := strings.Trim(strings.Join([]string{n.v1, n.v2}, " or "), " or")
		if n.v1 == n.v2 {
			names = n.v1
		}
		return fmt.Errorf("%s: this host has no cgroup controller %s that offers it: %w", n.field, names, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// Check is the host's, see there.
func (g *Group) Check(r *specs.LinuxResources) error { return g.host.Check(r) }

// need is a field and the controllers that serve it, empty where that version does not.
type need struct{ field, v1, v2 string }

func needs(r *specs.LinuxResources) []need {
	var out []need
	add := func(asked bool, field, v1, v2 string) {
		if asked {
			out = append(out, need{field, v1, v2})
		}
	}
	if c := r.CPU; c != nil {
		add(c.Cpus != "", "cpu.cpus", "cpuset", "cpuset")
		add(c.Mems != "", "cpu.mems", "cpuset", "cpuset")
		add(c.Shares != nil, "cpu.shares", "cpu", "cpu")
		add(c.Quota != nil, "cpu.quota", "cpu", "cpu")
		add(c.Period != nil, "cpu.period", "cpu", "cpu")
		add(c.Burst != nil, "cpu.burst", "cpu", "cpu")
		add(c.Idle != nil, "cpu.idle", "cpu", "cpu")
		add(c.RealtimeRuntime != nil && *c.RealtimeRuntime != 0, "cpu.realtimeRuntime", "cpu", "")
		add(c.RealtimePeriod != nil && *c.RealtimePeriod != 0, "cpu.realtimePeriod", "cpu", "")
	}
	if m := r.Memory; m != nil {
		add(m.Limit != nil, "memory.limit", "memory", "memory")
		add(m.Reservation != nil, "memory.reservation", "memory", "memory")
		add(m.Swap != nil, "memory.swap", "memory", "memory")
		add(m.Swappiness != nil, "memory.swappiness", "memory", "")
		add(m.DisableOOMKiller != nil && *m.DisableOOMKiller, "memory.disableOOMKiller", "memory", "")
	}
	if b := r.BlockIO; b != nil {
		add(b.Weight != nil && *b.Weight != 0, "blockIO.weight", "blkio", "io")
		add(b.LeafWeight != nil && *b.LeafWeight != 0, "blockIO.leafWeight", "blkio", "")
		add(len(b.WeightDevice) > 0, "blockIO.weightDevice", "blkio", "io")
		add(len(b.ThrottleReadBpsDevice) > 0, "blockIO.throttleReadBpsDevice", "blkio", "io")
		add(len(b.ThrottleWriteBpsDevice) > 0, "blockIO.throttleWriteBpsDevice", "blkio", "io")
		add(len(b.ThrottleReadIOPSDevice) > 0, "blockIO.throttleReadIOPSDevice", "blkio", "io")
		add(len(b.ThrottleWriteIOPSDevice) > 0, "blockIO.throttleWriteIOPSDevice", "blkio", "io")
	}
	if n := r.Network; n != nil {
		add(n.ClassID != nil && *n.ClassID != 0, "network.classID", "net_cls", "")
		add(len(n.Priorities) > 0, "network.priorities", "net_prio", "")
	}
	add(r.Pids != nil && r.Pids.Limit != nil, "pids.limit", "pids", "pids")
	add(len(r.HugepageLimits) > 0, "hugepageLimits", "hugetlb", "hugetlb")
	add(len(r.Rdma) > 0, "rdma", "rdma", "rdma")
	for k := range r.Unified {
		c, _, _ := strings.Cut(k, ".")
		add(true, "unified["+k+"]", "", c)
	}
	return out
}
