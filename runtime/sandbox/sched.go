package sandbox

import (
	"encoding/binary"
	"fmt"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"skein/runtime/zygote"
)

// maxCPUs bounds the numbers in lists of CPUs and memory nodes, as kernels do.
const maxCPUs = 8192

func ioClass(c specs.IOPriorityClass) (int, bool) {
	n, ok := map[specs.IOPriorityClass]int{specs.IOPRIO_CLASS_RT: 1, specs.IOPRIO_CLASS_BE: 2, specs.IOPRIO_CLASS_IDLE: 3}[c]
	return n, ok
}

func schedPolicy(p specs.LinuxSchedulerPolicy) (uint32, bool) {
	n, ok := map[specs.LinuxSchedulerPolicy]uint32{specs.SchedOther: unix.SCHED_NORMAL, specs.SchedFIFO: unix.SCHED_FIFO, specs.SchedRR: unix.SCHED_RR,
		specs.SchedBatch: unix.SCHED_BATCH, specs.SchedIdle: unix.SCHED_IDLE, specs.SchedDeadline: unix.SCHED_DEADLINE}[p]
	return n, ok
}

// schedFlag knows no clamps of utilization: the specification has no fields for their values.
func schedFlag(f specs.LinuxSchedulerFlag) (uint64, bool) {
	n, ok := map[specs.LinuxSchedulerFlag]uint64{specs.SchedFlagResetOnFork: unix.SCHED_FLAG_RESET_ON_FORK, specs.SchedFlagReclaim: unix.SCHED_FLAG_RECLAIM,
		specs.SchedFlagDLOverrun: unix.SCHED_FLAG_DL_OVERRUN, specs.SchedFlagKeepPolicy: unix.SCHED_FLAG_KEEP_POLICY,
		specs.SchedFlagKeepParams: unix.SCHED_FLAG_KEEP_PARAMS}[f]
	return n, ok
}

func memoryMode(m specs.MemoryPolicyModeType) (int, bool) {
	n, ok := map[specs.MemoryPolicyModeType]int{specs.MpolDefault: 0, specs.MpolPreferred: 1, specs.MpolBind: 2, specs.MpolInterleave: 3, specs.MpolLocal: 4,
		specs.MpolPreferredMany: 5, specs.MpolWeightedInterleave: 6}[m]
	return n, ok
}

func memoryFlag(f specs.MemoryPolicyFlagType) (int, bool) {
	n, ok := map[specs.MemoryPolicyFlagType]int{specs.MpolFStaticNodes: 1 << 15, specs.MpolFRelativeNodes: 1 << 14, specs.MpolFNumaBalancing: 1 << 13}[f]
	return n, ok
}

// parseList turns a list like 0-3,7 into a mask of whole 64-bit words.
func parseList(list string) ([]byte, error) {
	var mask []byte
	for part := range strings.SplitSeq(list, ",") {
		lo, hi, ranged := strings.Cut(strings.TrimSpace(part), "-")
		if !ranged {
			hi = lo
		}
		a, err1 := strconv.ParseUint(lo, 10, 16)
		b, err2 := strconv.ParseUint(hi, 10, 16)
		if err1 != nil || err2 != nil || a > b || b >= maxCPUs {
			return nil, fmt.Errorf("%q: want numbers and ranges below %d, like 0-3,7: %w", list, maxCPUs, errdefs.ErrInvalidArgument)
		}
		for ; a <= b; a++ {
			for uint64(len(mask)) <= a/8 {
				mask = append(mask, make([]byte, 8)...)
			}
			mask[a/8] |= 1 << (a % 8)
		}
	}
	return mask, nil
}

func checkScheduling(p *specs.Process) error {
	invalid := func(field, format string, args ...any) error {
		return fmt.Errorf("process.%s: %s: %w", field, fmt.Sprintf(format, args...), errdefs.ErrInvalidArgument)
	}
	if io := p.IOPriority; io != nil {
		if _, ok := ioClass(io.Class); !ok {
			return invalid("ioPriority.class", "%q is unknown", io.Class)
		}
		if io.Priority < 0 || io.Priority > 7 {
			return invalid("ioPriority.priority", "%d: want 0 to 7", io.Priority)
		}
	}
	if a := p.ExecCPUAffinity; a != nil {
		for field, list := range map[string]string{"initial": a.Initial, "final": a.Final} {
			if list == "" {
				continue
			}
			if _, err := parseList(list); err != nil {
				return fmt.Errorf("process.execCPUAffinity.%s: %w", field, err)
			}
		}
	}
	s := p.Scheduler
	if s == nil {
		return nil
	}
	policy, ok := schedPolicy(s.Policy)
	realtime := policy == unix.SCHED_FIFO || policy == unix.SCHED_RR
	switch {
	case !ok:
		return invalid("scheduler.policy", "%q is not offered by Linux", s.Policy)
	case s.Nice < -20 || s.Nice > 19:
		return invalid("scheduler.nice", "%d: want -20 to 19", s.Nice)
	case realtime && (s.Priority < 1 || s.Priority > 99):
		return invalid("scheduler.priority", "%d: %s wants 1 to 99", s.Priority, s.Policy)
	case !realtime && s.Priority != 0:
		return invalid("scheduler.priority", "%d: %s has none", s.Priority, s.Policy)
	case policy != unix.SCHED_DEADLINE && s.Runtime|s.Deadline|s.Period != 0:
		return invalid("scheduler.runtime", "runtime, deadline and period belong to SCHED_DEADLINE, not to %s", s.Policy)
	case policy == unix.SCHED_DEADLINE && (s.Runtime == 0 || s.Runtime > s.Deadline || s.Period != 0 && s.Deadline > s.Period):
		return invalid("scheduler.runtime", "%d: want more than 0, at most the deadline %d, and that at most the period %d", s.Runtime, s.Deadline, s.Period)
	}
	for i, f := range s.Flags {
		if _, ok := schedFlag(f); !ok {
			return fmt.Errorf("process.scheduler.flags[%d]: %q is not offered: %w", i, f, errdefs.ErrNotImplemented)
		}
	}
	return nil
}

func checkMemoryPolicy(m *specs.LinuxMemoryPolicy) error {
	if m == nil {
		return nil
	}
	mode, ok := memoryMode(m.Mode)
	none := mode == 0 || mode == 4
	switch {
	case !ok:
		return fmt.Errorf("linux.memoryPolicy.mode: %q is unknown: %w", m.Mode, errdefs.ErrInvalidArgument)
	case none && m.Nodes != "":
		return fmt.Errorf("linux.memoryPolicy.nodes: %s takes none: %w", m.Mode, errdefs.ErrInvalidArgument)
	case !none && mode != 1 && m.Nodes == "":
		return fmt.Errorf("linux.memoryPolicy.nodes: %s needs some: %w", m.Mode, errdefs.ErrInvalidArgument)
	}
	for i, f := range m.Flags {
		if _, ok := memoryFlag(f); !ok {
			return fmt.Errorf("linux.memoryPolicy.flags[%d]: %q is unknown: %w", i, f, errdefs.ErrInvalidArgument)
		}
	}
	if m.Nodes == "" {
		return nil
	}
	if _, err := parseList(m.Nodes); err != nil {
		return fmt.Errorf("linux.memoryPolicy.nodes: %w", err)
	}
	return nil
}

// memoryPolicy says where the process's memory comes from; it outlives execve.
func memoryPolicy(p *zygote.Program, m *specs.LinuxMemoryPolicy) error {
	if m == nil {
		return nil
	}
	if err := checkMemoryPolicy(m); err != nil {
		return err
	}
	mode, _ := memoryMode(m.Mode)
	for _, f := range m.Flags {
		n, _ := memoryFlag(f)
		mode |= n
	}
	if m.Nodes == "" {
		p.Do("linux.memoryPolicy "+string(m.Mode), unix.SYS_SET_MEMPOLICY, mode, 0, 0)
		return nil
	}
	mask, err := parseList(m.Nodes)
	if err != nil {
		return err
	}
	p.Do("linux.memoryPolicy "+string(m.Mode)+" "+m.Nodes, unix.SYS_SET_MEMPOLICY, mode, p.Bytes(mask), 8*len(mask)+1)
	return nil
}

// scheduling sets how CPU and disks are shared with others, while the process still may.
func scheduling(p *zygote.Program, proc *specs.Process) error {
	if err := checkScheduling(proc); err != nil {
		return err
	}
	if io := proc.IOPriority; io != nil {
		class, _ := ioClass(io.Class)
		p.Do(fmt.Sprintf("process.ioPriority %s %d", io.Class, io.Priority), unix.SYS_IOPRIO_SET, 1, 0, class<<13|io.Priority)
	}
	s := proc.Scheduler
	if s == nil {
		return nil
	}
	policy, _ := schedPolicy(s.Policy)
	var flags uint64
	for _, f := range s.Flags {
		n, _ := schedFlag(f)
		flags |= n
	}
	attr := binary.LittleEndian.AppendUint32(nil, 48)
	attr = binary.LittleEndian.AppendUint32(attr, policy)
	attr = binary.LittleEndian.AppendUint64(attr, flags)
	attr = binary.LittleEndian.AppendUint32(attr, uint32(s.Nice))
	attr = binary.LittleEndian.AppendUint32(attr, uint32(s.Priority))
	for _, v := range []uint64{s.Runtime, s.Deadline, s.Period} {
		attr = binary.LittleEndian.AppendUint64(attr, v)
	}
	p.Do("process.scheduler "+string(s.Policy), unix.SYS_SCHED_SETATTR, 0, p.Bytes(attr), 0)
	return nil
}

// affinity binds an additional process to CPUs.
func affinity(p *zygote.Program, field, list string) error {
	if list == "" {
		return nil
	}
	mask, err := parseList(list)
	if err != nil {
		return fmt.Errorf("process.execCPUAffinity.%s: %w", field, err)
	}
	p.Do("process.execCPUAffinity."+field+" "+list, unix.SYS_SCHED_SETAFFINITY, 0, len(mask), p.Bytes(mask))
	return nil
}
