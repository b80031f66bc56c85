package cgroup

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// realtime sets the budget of realtime processes, which only v1 has.
func (g *Group) realtime(c *specs.LinuxCPU) error {
	if (c.RealtimePeriod == nil || *c.RealtimePeriod == 0) && (c.RealtimeRuntime == nil || *c.RealtimeRuntime == 0) {
		return nil
	}
	dir, v1, ok := g.dir("cpu")
	if !ok || !v1 {
		return g.missing("cpu (v1)", "realtime CPU")
	}
	if _, err := os.Stat(filepath.Join(dir, "cpu.rt_runtime_us")); err != nil {
		return fmt.Errorf("realtime CPU limit: this kernel has no realtime group scheduling: %w", errdefs.ErrFailedPrecondition)
	}
	if err := files(dir, "cpu.rt_period_us", itoa(c.RealtimePeriod), "cpu.rt_runtime_us", itoa(c.RealtimeRuntime)); err != nil {
		return fmt.Errorf("realtime CPU limit: it must fit into that of the group above, whose cpu.rt_runtime_us is 0 at first: %w", err)
	}
	return nil
}

// blockIOWeights sets the weights of single devices, and the leaf weights of v1 kernels that have them.
func (g *Group) blockIOWeights(b *specs.LinuxBlockIO) error {
	if (b.LeafWeight == nil || *b.LeafWeight == 0) && len(b.WeightDevice) == 0 {
		return nil
	}
	dir, v1, ok := g.dir("blkio")
	if !ok {
		if dir, v1, ok = g.dir("io"); !ok {
			return g.missing("blkio or io", "block I/O weight")
		}
	}
	if b.LeafWeight != nil && *b.LeafWeight != 0 {
		if err := leaf(dir, v1, fmt.Sprint(*b.LeafWeight)); err != nil {
			return err
		}
	}
	for _, d := range b.WeightDevice {
		dev := fmt.Sprintf("%d:%d ", d.Major, d.Minor)
		if d.LeafWeight != nil && *d.LeafWeight != 0 {
			if err := leaf(dir, v1, dev+fmt.Sprint(*d.LeafWeight)); err != nil {
				return err
			}
		}
		if d.Weight == nil || *d.Weight == 0 {
			continue
		}
		names := []string{"io.bfq.weight"}
		if v1 {
			names = []string{"blkio.weight_device", "blkio.bfq.weight_device"}
		}
		if err := firstFile(dir, names, dev+fmt.Sprint(*d.Weight)); err != nil {
			return fmt.Errorf("block I/O weight of device %s needs the BFQ scheduler: %w", strings.TrimSpace(dev), err)
		}
	}
	return nil
}

func leaf(dir string, v1 bool, value string) error {
	name := "blkio.leaf_weight"
	if strings.Contains(value, ":") {
		name += "_device"
	}
	if _, err := os.Stat(filepath.Join(dir, name)); err != nil || !v1 {
		return fmt.Errorf("block I/O leaf weight: this kernel has no %s: %w", name, errdefs.ErrFailedPrecondition)
	}
	return files(dir, name, value)
}

// firstFile writes to the first of the names that takes the value.
func firstFile(dir string, names []string, value string) error {
	var err error
	for _, n := range names {
		if err = files(dir, n, value); err == nil {
			return nil
		}
	}
	return err
}

// hugepages limits huge pages by size; a size this machine does not have is refused.
func (g *Group) hugepages(r *specs.LinuxResources) error {
	for _, l := range r.HugepageLimits {
		dir, v1, ok := g.dir("hugetlb")
		if !ok {
			return g.missing("hugetlb", "huge page")
		}
		name := "hugetlb." + l.Pagesize + ".max"
		if v1 {
			name = "hugetlb." + l.Pagesize + ".limit_in_bytes"
		}
		if strings.Contains(l.Pagesize, "/") {
			return fmt.Errorf("huge page size %q: %w", l.Pagesize, errdefs.ErrInvalidArgument)
		}
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			return fmt.Errorf("huge page limit: this machine has no pages of size %q: %w", l.Pagesize, errdefs.ErrInvalidArgument)
		}
		if err := files(dir, name, fmt.Sprint(l.Limit)); err != nil {
			return err
		}
	}
	return nil
}

func (g *Group) rdma(r *specs.LinuxResources) error {
	for dev, l := range r.Rdma {
		dir, _, ok := g.dir("rdma")
		if !ok {
			return g.missing("rdma", "RDMA")
		}
		v := dev
		if l.HcaHandles != nil {
			v += fmt.Sprintf(" hca_handle=%d", *l.HcaHandles)
		}
		if l.HcaObjects != nil {
			v += fmt.Sprintf(" hca_object=%d", *l.HcaObjects)
		}
		if err := files(dir, "rdma.max", v); err != nil {
			return err
		}
	}
	return nil
}

// network sets the class and priorities of the group's traffic, which only v1 has.
func (g *Group) network(r *specs.LinuxResources) error {
	n := r.Network
	if n == nil {
		return nil
	}
	if n.ClassID != nil && *n.ClassID != 0 {
		dir, v1, ok := g.dir("net_cls")
		if !ok || !v1 {
			return g.missing("net_cls", "network class")
		}
		if err := files(dir, "net_cls.classid", fmt.Sprint(*n.ClassID)); err != nil {
			return err
		}
	}
	for _, p := range n.Priorities {
		dir, v1, ok := g.dir("net_prio")
		if !ok || !v1 {
			return g.missing("net_prio", "network priority")
		}
		if err := files(dir, "net_prio.ifpriomap", fmt.Sprintf("%s %d", p.Name, p.Priority)); err != nil {
			return err
		}
	}
	return nil
}

// kernelMemory limits the buffers of TCP sockets on v1; a limit of all kernel memory is no longer in any supported kernel and, as the
// specification allows, left out.
func (g *Group) kernelMemory(r *specs.LinuxResources) error {
	if r.Memory == nil || r.Memory.KernelTCP == nil {
		return nil
	}
	dir, v1, ok := g.dir("memory")
	if !ok || !v1 {
		return nil
	}
	return files(dir, "memory.kmem.tcp.limit_in_bytes", itoa(r.Memory.KernelTCP))
}

// aboveUsage refuses a limit below what is in use, where that is asked for; otherwise the kernel takes memory away or kills.
func aboveUsage(dir string, v1 bool, m *specs.LinuxMemory) error {
	if m.CheckBeforeUpdate == nil || !*m.CheckBeforeUpdate || m.Limit == nil || *m.Limit < 0 {
		return nil
	}
	file := "memory.current"
	if v1 {
		file = "memory.usage_in_bytes"
	}
	b, err := read(filepath.Join(dir, file))
	if err != nil {
		return fmt.Errorf("memory limit %d: read what is in use: %w", *m.Limit, err)
	}
	if used, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64); err == nil && used > *m.Limit {
		return fmt.Errorf("memory limit %d is below the %d bytes in use: %w", *m.Limit, used, errdefs.ErrFailedPrecondition)
	}
	return nil
}
