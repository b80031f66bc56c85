package sandbox

import (
	"fmt"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// maxErrno is what the kernel takes as an error number of a filter.
const maxErrno = 4095

// seccompFlag is a flag as seccomp(2) wants it. TSYNC has nothing to do: the process has one thread.
func seccompFlag(f specs.LinuxSeccompFlag) (uint64, bool) {
	switch f {
	case specs.LinuxSeccompFlagLog:
		return unix.SECCOMP_FILTER_FLAG_LOG, true
	case specs.LinuxSeccompFlagSpecAllow:
		return unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW, true
	case specs.LinuxSeccompFlagWaitKillableRecv:
		return unix.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV, true
	case "SECCOMP_FILTER_FLAG_TSYNC":
		return 0, true
	}
	return 0, false
}

// knownArch are the conventions of the specification; filters are made for those of them that this machine can run.
func knownArch(a specs.Arch) bool {
	return slices.Contains([]specs.Arch{specs.ArchX86, specs.ArchX86_64, specs.ArchX32, specs.ArchARM, specs.ArchAARCH64, specs.ArchMIPS, specs.ArchMIPS64,
		specs.ArchMIPS64N32, specs.ArchMIPSEL, specs.ArchMIPSEL64, specs.ArchMIPSEL64N32, specs.ArchPPC, specs.ArchPPC64, specs.ArchPPC64LE, specs.ArchS390,
		specs.ArchS390X, specs.ArchPARISC, specs.ArchPARISC64, specs.ArchRISCV64, specs.ArchLOONGARCH64, specs.ArchM68K, specs.ArchSH, specs.ArchSHEB}, a)
}

func notifies(s *specs.LinuxSeccomp) bool {
	return slices.ContainsFunc(s.Syscalls, func(r specs.LinuxSyscall) bool { return r.Action == specs.ActNotify })
}

// CheckSeccomp refuses a filter that cannot be compiled; errors name the field below linux.seccomp.
func CheckSeccomp(s *specs.LinuxSeccomp) error {
	if s == nil {
		return nil
	}
	if err := checkAction(s.DefaultAction, s.DefaultErrnoRet); err != nil {
		return fmt.Errorf("defaultAction: %w", err)
	}
	if s.DefaultAction == specs.ActNotify {
		return fmt.Errorf("defaultAction: %s would stop the process before its listener is taken: name system calls: %w", s.DefaultAction, errdefs.ErrInvalidArgument)
	}
	for i, a := range s.Architectures {
		if !knownArch(a) {
			return fmt.Errorf("architectures[%d]: %q is unknown: %w", i, a, errdefs.ErrInvalidArgument)
		}
	}
	for i, f := range s.Flags {
		if _, ok := seccompFlag(f); !ok {
			return fmt.Errorf("flags[%d]: %q is unknown: %w", i, f, errdefs.ErrInvalidArgument)
		}
		if f == specs.LinuxSeccompFlagWaitKillableRecv && !notifies(s) {
			return fmt.Errorf("flags[%d]: %s needs a rule with SCMP_ACT_NOTIFY: %w", i, f, errdefs.ErrInvalidArgument)
		}
	}
	for i, r := range s.Syscalls {
		if err := checkRule(r); err != nil {
			return fmt.Errorf("syscalls[%d].%w", i, err)
		}
	}
	switch {
	case notifies(s) && s.ListenerPath == "":
		return fmt.Errorf("listenerPath: a rule with SCMP_ACT_NOTIFY needs one: %w", errdefs.ErrInvalidArgument)
	case !notifies(s) && s.ListenerPath != "":
		return fmt.Errorf("listenerPath: no rule has the action SCMP_ACT_NOTIFY: %w", errdefs.ErrInvalidArgument)
	}
	return nil
}

func checkAction(a specs.LinuxSeccompAction, errno *uint) error {
	if _, err := action(a, nil); err != nil {
		return err
	}
	switch {
	case errno == nil:
		return nil
	case a == specs.ActErrno && *errno > maxErrno, a == specs.ActTrace && *errno > 0xffff:
		return fmt.Errorf("errno %d is too large: %w", *errno, errdefs.ErrInvalidArgument)
	case a != specs.ActErrno && a != specs.ActTrace:
		return fmt.Errorf("%s returns no errno: %w", a, errdefs.ErrInvalidArgument)
	}
	return nil
}

func checkRule(r specs.LinuxSyscall) error {
	if len(r.Names) == 0 {
		return fmt.Errorf("names: none: %w", errdefs.ErrInvalidArgument)
	}
	if err := checkAction(r.Action, r.ErrnoRet); err != nil {
		return fmt.Errorf("action: %w", err)
	}
	for _, n := range []string{"read", "write"} {
		if r.Action == specs.ActNotify && slices.Contains(r.Names, n) {
			return fmt.Errorf("names: %s is needed to hand the listener over and cannot wait for it: %w", n, errdefs.ErrInvalidArgument)
		}
	}
	for i, a := range r.Args {
		switch {
		case a.Index > 5:
			return fmt.Errorf("args[%d].index: %d, a system call has 6 arguments: %w", i, a.Index, errdefs.ErrInvalidArgument)
		case !knownOp(a.Op):
			return fmt.Errorf("args[%d].op: %q is unknown: %w", i, a.Op, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}
