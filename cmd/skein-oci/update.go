package main

import (
	"flag"
	"strconv"

	"github.com/opencontainers/runtime-spec/specs-go"

	"skein/runtime/oci"
)

func updateCommand() command {
	return command{"update", "ID", "change limits of a container", func(s *session, f *flag.FlagSet) func([]string) error {
		r := &specs.LinuxResources{}
		var file string
		for _, n := range []string{"resources", "r"} {
			f.StringVar(&file, n, "", "`file` with linux.resources as JSON, - for standard input; then no other flag counts")
		}
		mem := func() *specs.LinuxMemory {
			if r.Memory == nil {
				r.Memory = &specs.LinuxMemory{}
			}
			return r.Memory
		}
		cpu := func() *specs.LinuxCPU {
			if r.CPU == nil {
				r.CPU = &specs.LinuxCPU{}
			}
			return r.CPU
		}
		signed := func(name, help string, set func(*int64)) {
			f.Func(name, help, func(v string) error {
				n, err := strconv.ParseInt(v, 10, 64)
				set(&n)
				return err
			})
		}
		unsigned := func(name, help string, set func(*uint64)) {
			f.Func(name, help, func(v string) error {
				n, err := strconv.ParseUint(v, 10, 64)
				set(&n)
				return err
			})
		}
		signed("memory", "`bytes` of memory, -1 for no limit", func(n *int64) { mem().Limit = n })
		signed("memory-reservation", "soft limit in `bytes`", func(n *int64) { mem().Reservation = n })
		signed("memory-swap", "memory and swap together in `bytes`, -1 for no limit", func(n *int64) { mem().Swap = n })
		signed("cpu-quota", "`microseconds` of CPU in a period, -1 for no limit", func(n *int64) { cpu().Quota = n })
		unsigned("cpu-period", "`microseconds` of a period", func(n *uint64) { cpu().Period = n })
		unsigned("cpu-share", "relative `weight`", func(n *uint64) { cpu().Shares = n })
		signed("pids-limit", "`number` of processes, -1 for no limit", func(n *int64) { r.Pids = &specs.LinuxPids{Limit: n} })
		f.Func("cpuset-cpus", "CPUs to use, like `0-2,4`", func(v string) error { cpu().Cpus = v; return nil })
		f.Func("cpuset-mems", "memory nodes to use, like `0`", func(v string) error { cpu().Mems = v; return nil })
		f.Func("blkio-weight", "relative `weight` of block I/O, 10 to 1000", func(v string) error {
			n, err := strconv.ParseUint(v, 10, 16)
			w := uint16(n)
			r.BlockIO = &specs.LinuxBlockIO{Weight: &w}
			return err
		})
		return func(args []string) error {
			id, err := one(args)
			if err != nil {
				return err
			}
			if file != "" {
				if r, err = readResources(file); err != nil {
					return err
				}
			}
			return s.with(id, true, func(c *oci.Container) error { return c.Update(r) })
		}
	}}
}
