package rootfs

import (
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// checkProc refuses what would take the place of the proc filesystem, or of more in it than the files about resources that are customary:
// programs, and whoever adds processes to the container, trust what is there.
func checkProc(m specs.Mount, bind bool) error {
	dst := clean(m.Destination)
	rel, below := strings.CutPrefix(dst, "proc/")
	switch {
	case dst != "proc" && !below, dst == "proc" && !bind && m.Type == "proc":
		return nil
	case dst == "proc" && bind:
		var st unix.Statfs_t
		if err := unix.Statfs(m.Source, &st); err == nil && st.Type == unix.PROC_SUPER_MAGIC {
			return nil
		}
	case bind && slices.Contains([]string{"cpuinfo", "diskstats", "meminfo", "stat", "swaps", "uptime", "loadavg", "slabinfo", "net/dev",
		"sys/kernel/ns_last_pid", "sys/crypto/fips_enabled"}, rel):
		return nil
	}
	return fmt.Errorf("mount %s: nothing but the proc filesystem can be mounted on or below /proc: mount it elsewhere: %w", m.Destination, errdefs.ErrInvalidArgument)
}
