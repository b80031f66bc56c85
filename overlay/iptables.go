package overlay

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// oldFamily is the kernel's packet filter from before nftables, of one family: what linux/netfilter_ipv4/ip_tables.h and its IPv6 twin say
// about where things lie.
type oldFamily struct {
	program string // whose table it is
	names   string // file below /proc/net that lists the tables in use
	family  int
	level   int
	iface   int // offset of the input device in an entry
	target  int // offset of target_offset, which next_offset follows
}

func oldFamilies() []oldFamily {
	return []oldFamily{
		{"iptables", "ip_tables_names", unix.AF_INET, unix.SOL_IP, 16, 88},
		{"ip6tables", "ip6_tables_names", unix.AF_INET6, unix.SOL_IPV6, 64, 140},
	}
}

const (
	oldGetInfo    = 64 // IPT_SO_GET_INFO
	oldGetEntries = 65
	oldNameLen    = 32
	oldInfoLen    = 84
	oldForward    = 2 // hook
	oldHeader     = oldNameLen + 8
	verdictOffset = 32 // in a standard target
	verdictDrop   = -1
)

// dropsForward tells that the policy of FORWARD is DROP and no rule there speaks of gateway legs. A table that nobody uses is not made by
// asking. The caller is in the namespace.
func (f oldFamily) dropsForward() (bool, error) {
	used, err := os.ReadFile("/proc/thread-self/net/" + f.names)
	if errors.Is(err, os.ErrNotExist) || err == nil && !strings.Contains("\n"+string(used), "\nfilter\n") {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	fd, err := unix.Socket(f.family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return false, err
	}
	defer unix.Close(fd)
	info := make([]byte, oldInfoLen)
	copy(info, "filter")
	if err := getsockopt(fd, f.level, oldGetInfo, info); err != nil {
		return false, err
	}
	size := binary.NativeEndian.Uint32(info[oldInfoLen-4:])
	first := binary.NativeEndian.Uint32(info[oldNameLen+4+4*oldForward:])
	policy := binary.NativeEndian.Uint32(info[oldNameLen+4+20+4*oldForward:])
	all := make([]byte, oldHeader+int(size))
	copy(all, "filter")
	binary.NativeEndian.PutUint32(all[oldNameLen:], size)
	if err := getsockopt(fd, f.level, oldGetEntries, all); err != nil {
		return false, err
	}
	return f.reads(all[oldHeader:], int(first), int(policy))
}

// reads walks the chain from its first entry to the one that is its policy.
func (f oldFamily) reads(entries []byte, first, policy int) (drops bool, err error) {
	for at := first; ; {
		if at < 0 || at+f.target+4 > len(entries) {
			return false, fmt.Errorf("an entry at %d of %d bytes", at, len(entries))
		}
		e := entries[at:]
		target, next := int(binary.NativeEndian.Uint16(e[f.target:])), int(binary.NativeEndian.Uint16(e[f.target+2:]))
		if at == policy {
			if target+verdictOffset+4 > len(e) {
				return false, fmt.Errorf("a target at %d of %d bytes", at+target, len(entries))
			}
			return int32(binary.NativeEndian.Uint32(e[target+verdictOffset:])) == verdictDrop, nil
		}
		if bytes.HasPrefix(e[f.iface:], []byte(gatewayPrefix)) {
			return false, nil // somebody has seen to it
		}
		if next <= 0 {
			return false, fmt.Errorf("an entry of %d bytes", next)
		}
		at += next
	}
}

func getsockopt(fd, level, name int, b []byte) error {
	n := uint32(len(b))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(name), uintptr(unsafe.Pointer(&b[0])), uintptr(unsafe.Pointer(&n)), 0)
	if errno != 0 {
		return errno
	}
	return nil
}
