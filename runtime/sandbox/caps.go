package sandbox

import (
	"fmt"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// capNames are the capabilities by number.
func capNames() []string {
	return []string{"CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP",
		"LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER", "SYS_MODULE",
		"SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE", "SYS_RESOURCE", "SYS_TIME",
		"SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP", "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG",
		"WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF", "CHECKPOINT_RESTORE"}
}

// DefaultCaps are the capabilities of a container unless its user asks otherwise.
func DefaultCaps() []string {
	return []string{"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID",
		"CAP_SETUID", "CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE"}
}

// KnownCaps are the names of all capabilities, whether this process has them or not.
func KnownCaps() []string {
	out := make([]string, 0, len(capNames()))
	for _, n := range capNames() {
		out = append(out, "CAP_"+n)
	}
	return out
}

// AllCaps are the capabilities in this process's bounding set: what "all" can mean here.
func AllCaps() []string {
	has := boundingSet()
	var out []string
	for i, n := range capNames() {
		if has>>i&1 != 0 {
			out = append(out, "CAP_"+n)
		}
	}
	return out
}

// boundingSet is this thread's, as bits.
func boundingSet() uint64 {
	var set uint64
	for i := range capNames() {
		if has, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, uintptr(i), 0, 0, 0); err == nil && has == 1 {
			set |= 1 << i
		}
	}
	return set
}

// capBits is a list of names as bits.
func capBits(list []string) (uint64, error) {
	var bits uint64
next:
	for _, c := range list {
		for i, n := range capNames() {
			if c == "CAP_"+n {
				bits |= 1 << i
				continue next
			}
		}
		return 0, fmt.Errorf("capability %q is unknown: names are like CAP_NET_RAW: %w", c, errdefs.ErrInvalidArgument)
	}
	return bits, nil
}
