package sandbox

import (
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// maxName is the kernel's limit of host and domain names.
const maxName = 64

// CheckComplete refuses what CompileComplete would not do, with the field that is at fault. It makes nothing.
func CheckComplete(s *specs.Spec) error {
	flags, join, err := Split(s)
	if err != nil {
		return err
	}
	if err := checkNames(s, flags, join); err != nil {
		return err
	}
	if err := checkTime(s, flags); err != nil {
		return err
	}
	if len(s.Linux.Sysctl) > 0 && !mounts(s, "proc", "/proc") {
		return fmt.Errorf("linux.sysctl: needs a proc mount on /proc: %w", errdefs.ErrInvalidArgument)
	}
	for n, v := range s.Linux.Sysctl {
		if err := sysctlAllowed(n, v, s); err != nil {
			return fmt.Errorf("linux.sysctl: %w", err)
		}
	}
	if s.Process.Terminal && (!mounts(s, "devpts", "/dev/pts") || !mounts(s, "tmpfs", "/dev")) {
		return fmt.Errorf("process.terminal: needs a devpts mount on /dev/pts and a tmpfs on /dev: %w", errdefs.ErrInvalidArgument)
	}
	if err := checkMemoryPolicy(s.Linux.MemoryPolicy); err != nil {
		return err
	}
	if err := CheckSeccomp(s.Linux.Seccomp); err != nil {
		return fmt.Errorf("linux.seccomp.%w", err)
	}
	return nil
}

func mounts(s *specs.Spec, typ, dst string) bool {
	return slices.ContainsFunc(s.Mounts, func(m specs.Mount) bool { return m.Type == typ && path.Clean(m.Destination) == dst })
}

func checkNames(s *specs.Spec, flags uint64, join []NamespacePath) error {
	own := flags&unix.CLONE_NEWUTS != 0 || slices.ContainsFunc(join, func(n NamespacePath) bool { return n.Type == specs.UTSNamespace })
	for field, name := range map[string]string{"hostname": s.Hostname, "domainname": s.Domainname} {
		switch {
		case name != "" && !own:
			return fmt.Errorf("%s: %q needs a UTS namespace of the container's own: %w", field, name, errdefs.ErrInvalidArgument)
		case len(name) > maxName:
			return fmt.Errorf("%s: %d bytes, at most %d: %w", field, len(name), maxName, errdefs.ErrInvalidArgument)
		case strings.ContainsAny(name, "\x00\n"):
			return fmt.Errorf("%s: %q is malformed: %w", field, name, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

func checkTime(s *specs.Spec, flags uint64) error {
	if len(s.Linux.TimeOffsets) > 0 && flags&unix.CLONE_NEWTIME == 0 {
		return fmt.Errorf("linux.timeOffsets: there is no new time namespace: %w", errdefs.ErrInvalidArgument)
	}
	for clock, o := range s.Linux.TimeOffsets {
		switch {
		case clock != "monotonic" && clock != "boottime":
			return fmt.Errorf("linux.timeOffsets: clock %q: want monotonic or boottime: %w", clock, errdefs.ErrInvalidArgument)
		case o.Nanosecs >= 1e9:
			return fmt.Errorf("linux.timeOffsets.%s.nanosecs: %d: want less than a second: %w", clock, o.Nanosecs, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// maxGroups is the kernel's limit of supplementary groups.
const maxGroups = 65536

// noID is the number that means "leave it" to the kernel and so is nobody's.
const noID = 1<<32 - 1

// CheckProcess refuses a process that the compiler would not start, with the field that is at fault.
func CheckProcess(proc *specs.Process) error {
	if c := proc.Capabilities; c != nil {
		for name, list := range map[string][]string{"bounding": c.Bounding, "effective": c.Effective, "permitted": c.Permitted,
			"inheritable": c.Inheritable, "ambient": c.Ambient} {
			if _, err := capBits(list); err != nil {
				return fmt.Errorf("process.capabilities.%s: %w", name, err)
			}
		}
	}
	u := proc.User
	switch {
	case u.UID == noID:
		return fmt.Errorf("process.user.uid: %d is nobody's: %w", u.UID, errdefs.ErrInvalidArgument)
	case u.GID == noID:
		return fmt.Errorf("process.user.gid: %d is nobody's: %w", u.GID, errdefs.ErrInvalidArgument)
	case slices.Contains(u.AdditionalGids, noID):
		return fmt.Errorf("process.user.additionalGids: %d is nobody's: %w", uint32(noID), errdefs.ErrInvalidArgument)
	case len(u.AdditionalGids) > maxGroups:
		return fmt.Errorf("process.user.additionalGids: %d, at most %d: %w", len(u.AdditionalGids), maxGroups, errdefs.ErrInvalidArgument)
	case u.Umask != nil && *u.Umask > 0o777:
		return fmt.Errorf("process.user.umask: %#o: want at most 0777: %w", *u.Umask, errdefs.ErrInvalidArgument)
	}
	if b := proc.ConsoleSize; b != nil && (b.Height > 1<<16-1 || b.Width > 1<<16-1) {
		return fmt.Errorf("process.consoleSize: %d by %d: want less than %d: %w", b.Width, b.Height, 1<<16, errdefs.ErrInvalidArgument)
	}
	if err := checkRlimits(proc.Rlimits); err != nil {
		return err
	}
	return checkScheduling(proc)
}

func checkRlimits(list []specs.POSIXRlimit) error {
	seen := map[string]bool{}
	for i, l := range list {
		n, ok := RlimitNumber(l.Type)
		var have unix.Rlimit
		switch {
		case !ok:
			return fmt.Errorf("process.rlimits[%d].type: %q is unknown: %w", i, l.Type, errdefs.ErrInvalidArgument)
		case seen[l.Type]:
			return fmt.Errorf("process.rlimits[%d].type: %s is listed twice: %w", i, l.Type, errdefs.ErrInvalidArgument)
		case l.Soft > l.Hard:
			return fmt.Errorf("process.rlimits[%d].soft: %d is above hard %d: %w", i, l.Soft, l.Hard, errdefs.ErrInvalidArgument)
		case unix.Getrlimit(n, &have) == nil && l.Hard > have.Max && boundingSet()>>unix.CAP_SYS_RESOURCE&1 == 0:
			return fmt.Errorf("process.rlimits[%d].hard: %s %d is above this host's %d, which only CAP_SYS_RESOURCE may raise: %w", i, l.Type, l.Hard, have.Max,
				errdefs.ErrPermissionDenied)
		}
		seen[l.Type] = true
	}
	return nil
}

// Unavailable are the capabilities that a process is configured to have and that this one has not to give.
func Unavailable(c *specs.LinuxCapabilities) []string {
	if c == nil {
		return nil
	}
	has := boundingSet()
	var out []string
	for _, list := range [][]string{c.Bounding, c.Effective, c.Permitted, c.Inheritable, c.Ambient} {
		for _, n := range list {
			if b, err := capBits([]string{n}); err == nil && b&^has != 0 && !slices.Contains(out, n) {
				out = append(out, n)
			}
		}
	}
	return out
}
