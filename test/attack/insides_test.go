package attack

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"skein/runtime"
	"skein/runtime/sandbox"
)

// TestCVE_2019_16884_2019_19921_2023_27561_2023_28642: an image or a volume takes the place of /proc, so that what a runtime does by a path
// below it, masks and labels, goes nowhere. Links are followed inside, and the filesystem there is real and masked; volumes are refused.
func TestCVE_2019_16884_2019_19921_2023_27561_2023_28642(t *testing.T) {
	w := newWorld(t)
	for i, target := range []string{"/t/proc", "t/proc", "../../../../t/proc"} {
		c := w.config(fmt.Sprintf("link%d", i), "guard")
		plant(t, w.upper(c.ID), map[string]string{"link": target, "proc": "link"})
		w.must(os.MkdirAll(filepath.Join(w.upper(c.ID), "t/proc"), 0o755))
		if x, out := w.run(c); x.Code != 0 {
			t.Errorf("/proc to %s: exit code %d %s", target, x.Code, out)
		}
		if out, code := w.ociRun(w.bundle(w.spec("guard"), map[string]string{"proc": "t/proc", "t/proc/x": "y"})); code != 0 {
			t.Errorf("OCI: %d %s", code, out)
		}
	}
	volume := w.folder("volume")
	for i, m := range []specs.Mount{
		{Destination: "/proc", Type: "bind", Source: volume, Options: []string{"rbind"}},
		{Destination: "/proc/", Type: "tmpfs", Source: "tmpfs"},
		{Destination: "/x/../proc/./self", Type: "bind", Source: volume, Options: []string{"bind"}},
		{Destination: "/proc/sys", Type: "bind", Source: volume, Options: []string{"bind"}},
		{Destination: "/proc/self/attr", Type: "tmpfs", Source: "tmpfs"},
		{Destination: "/proc/sysrq-trigger", Type: "bind", Source: "/etc/hosts", Options: []string{"bind"}},
	} {
		c := w.config(fmt.Sprintf("vol%d", i), "guard")
		c.Spec.Mounts = append(c.Spec.Mounts, m)
		if err := w.sup.Create(w.ctx, c); err == nil {
			t.Errorf("a %s on %s was accepted", m.Type, m.Destination)
			w.must(w.sup.Delete(w.ctx, c.ID))
		}
		s := w.spec("guard")
		s.Mounts = append(s.Mounts, m)
		if out, code := w.ociRun(w.bundle(s, nil)); code == 0 {
			t.Errorf("OCI: a %s on %s was accepted: %s", m.Type, m.Destination, out)
		}
	}
	// By way of a link in the image a volume gets there nevertheless: what is masked below it stays so.
	c := w.config("way", "ls", "/proc")
	plant(t, w.upper(c.ID), map[string]string{"way": "proc"})
	c.Spec.Mounts = append(c.Spec.Mounts, specs.Mount{Destination: "/way", Type: "bind", Source: volume, Options: []string{"bind"}})
	w.start(c)
	w.ended(c.ID, "")
	w.must(w.sup.Delete(w.ctx, c.ID))
	empty(t, volume)
}

// TestCVE_2024_21626: working directories that lead through descriptors, or other processes, to directories of the host. A runtime that
// has a directory of the host open when it enters the working directory, or that follows such links with its own rights, starts the
// process there.
func TestCVE_2024_21626(t *testing.T) {
	w := newWorld(t)
	dirs := []string{"/proc/1/cwd", "/proc/1/root", "/proc/self/cwd/../../..", "/proc/self/root", "/link", "/proc/self/task/1/cwd"}
	for n := range 24 {
		dirs = append(dirs, fmt.Sprintf("/proc/self/fd/%d", n), fmt.Sprintf("/proc/thread-self/fd/%d/../..", n))
	}
	if *long {
		for n := 24; n <= 1024; n++ {
			dirs = append(dirs, fmt.Sprintf("/proc/self/fd/%d", n))
		}
	}
	box := w.config("box", "say", "ready", "sleep")
	plant(t, w.upper(box.ID), map[string]string{"link": "/proc/self/fd/7"})
	w.start(box)
	for i, dir := range dirs {
		c := w.config(fmt.Sprintf("wd%d", i), "cwd", "fds", "ls", ".")
		plant(t, w.upper(c.ID), map[string]string{"link": "/proc/self/fd/7"})
		c.Spec.Process.Cwd = dir
		if err := w.sup.Create(w.ctx, c); err == nil {
			if _, err := w.sup.Start(w.ctx, c.ID); err == nil {
				w.ended(c.ID, "")
				insideOf(t, dir, w.log(c))
			}
			w.must(w.sup.Delete(w.ctx, c.ID))
		}
		if out, err := w.exec("box", runtime.Process{ID: fmt.Sprintf("x%d", i), Args: []string{"/hostile", "cwd", "fds", "ls", "."}, Cwd: dir}); err == nil {
			insideOf(t, "exec in "+dir, out)
		}
	}
	w.kill("box")
	for _, dir := range dirs[:12] {
		s := w.spec("cwd", "fds", "ls", ".")
		s.Process.Cwd = dir
		if out, code := w.ociRun(w.bundle(s, map[string]string{"link": "/proc/self/fd/7"})); code == 0 {
			insideOf(t, "OCI in "+dir, out)
		}
	}
	c := w.config("plain", "cwd", "fds")
	_, out := w.run(c)
	insideOf(t, "plain", out)
}

// insideOf asserts that a process is in its container and has three descriptors.
func insideOf(t testing.TB, what, out string) {
	t.Helper()
	for l := range strings.Lines(out) {
		f := strings.Fields(l)
		switch {
		case f[0] == "cwd" && (strings.Contains(l, "unreachable") || !strings.HasPrefix(f[1], "/")),
			f[0] == "fd" && f[1] != "0" && f[1] != "1" && f[1] != "2",
			f[0] == "ls" && strings.Contains(l, " home "):
			t.Errorf("%s: %s", what, l)
		}
	}
}

// hostHelpers are files by which root in a container could have the host run a program.
var hostHelpers = []string{"/proc/sys/kernel/core_pattern", "/proc/sys/kernel/modprobe", "/proc/sys/kernel/hotplug", "/sys/kernel/uevent_helper",
	"/proc/sys/fs/binfmt_misc/register", "/proc/sysrq-trigger", "/sys/kernel/debug/sched/features", "/sys/power/state", "/proc/sys/kernel/usermodehelper/bset"}

// TestCVE_2022_0492: no file that makes the host run a program can be written, nor a cgroup hierarchy be mounted, in a default container
// and in one without filter that makes a user namespace of its own. A container with a writable /sys, or cgroup filesystem, fails.
func TestCVE_2022_0492(t *testing.T) {
	w := newWorld(t)
	for i, free := range []bool{false, true} {
		args := []string{"nested", "mountcgroup", "memory", "mountcgroup", "rdma"}
		for _, p := range append([]string{"/proc/sys", "/sys/fs/cgroup", "/sys", "/proc/irq"}, hostHelpers[:2]...) {
			args = append(args, "remount", p)
		}
		for _, h := range hostHelpers {
			args = append(args, "write", h, "x")
		}
		args = append(args, "tamper", "/proc/sys", "tamper", "/sys/fs/cgroup", "tamper", "/sys/kernel")
		c := w.config(fmt.Sprintf("helper%d", i), args...)
		if free {
			c.Spec.Linux.Seccomp, c.Spec.Process.NoNewPrivileges = nil, false
		}
		before := corePattern(t)
		_, out := w.run(c)
		if corePattern(t) != before {
			t.Fatal("core_pattern was changed")
		}
		for l := range strings.Lines(out) {
			if strings.HasPrefix(l, "tampered") || strings.HasPrefix(l, "write ") && strings.HasSuffix(l, "<nil>\n") ||
				strings.HasPrefix(l, "mountcgroup") && strings.Contains(l, "<nil>") && !free || strings.HasPrefix(l, "remount") && strings.Contains(l, "<nil>") {
				t.Errorf("without filter %v: %s", free, l)
			}
		}
		lines(t, out, "tamper done /proc/sys .*", "tamper done /sys/fs/cgroup .*")
	}
}

// TestCVE_2022_0185_2022_0847: rare system calls by which kernel bugs are reached are refused by the default filter, and the layers below a
// container cannot be changed through it. A container without filter, or with its layers mounted writable, fails.
func TestCVE_2022_0185_2022_0847(t *testing.T) {
	w := newWorld(t)
	calls := map[string]string{"unshare": fmt.Sprintf("%d,%#x", unix.SYS_UNSHARE, unix.CLONE_NEWUSER)}
	for name, nr := range map[string]int{"mount": unix.SYS_MOUNT, "umount2": unix.SYS_UMOUNT2, "fsopen": unix.SYS_FSOPEN, "fsconfig": unix.SYS_FSCONFIG,
		"fsmount": unix.SYS_FSMOUNT, "open_tree": unix.SYS_OPEN_TREE, "move_mount": unix.SYS_MOVE_MOUNT, "mount_setattr": unix.SYS_MOUNT_SETATTR,
		"keyctl": unix.SYS_KEYCTL, "add_key": unix.SYS_ADD_KEY, "request_key": unix.SYS_REQUEST_KEY, "bpf": unix.SYS_BPF, "userfaultfd": unix.SYS_USERFAULTFD,
		"io_uring_setup": unix.SYS_IO_URING_SETUP, "io_uring_enter": unix.SYS_IO_URING_ENTER, "io_uring_register": unix.SYS_IO_URING_REGISTER,
		"perf_event_open": unix.SYS_PERF_EVENT_OPEN, "kexec_load": unix.SYS_KEXEC_LOAD, "init_module": unix.SYS_INIT_MODULE,
		"finit_module": unix.SYS_FINIT_MODULE, "delete_module": unix.SYS_DELETE_MODULE, "pivot_root": unix.SYS_PIVOT_ROOT, "setns": unix.SYS_SETNS,
		"swapon": unix.SYS_SWAPON, "reboot": unix.SYS_REBOOT, "open_by_handle_at": unix.SYS_OPEN_BY_HANDLE_AT, "acct": unix.SYS_ACCT,
		"quotactl": unix.SYS_QUOTACTL, "settimeofday": unix.SYS_SETTIMEOFDAY, "lookup_dcookie": unix.SYS_LOOKUP_DCOOKIE, "clone3": unix.SYS_CLONE3,
		"move_pages": unix.SYS_MOVE_PAGES, "personality": unix.SYS_PERSONALITY, "vhangup": unix.SYS_VHANGUP, "nfsservctl": unix.SYS_NFSSERVCTL} {
		calls[name] = fmt.Sprint(nr)
	}
	calls["personality"] += ",0x20000000" // a domain that the profile does not list
	calls["clone"] = fmt.Sprintf("%d,%#x", unix.SYS_CLONE, unix.CLONE_NEWUSER|uint64(unix.SIGCHLD))
	args := []string{"write", "/self", "hostile"}
	for name, spec := range calls {
		args = append(args, "call", name+"="+spec)
	}
	before := hostHash(t, filepath.Join(w.base, "self"))
	c := w.config("rare", args...)
	_, out := w.run(c)
	lines(t, out, "write /self <nil>")
	for name := range calls {
		lines(t, out, fmt.Sprintf("call %s (%d|%d)", name, int(unix.EPERM), int(unix.ENOSYS)))
	}
	if hostHash(t, filepath.Join(w.base, "self")) != before {
		t.Error("a layer below the container was changed")
	}
}

// TestCVE_2022_24769_2022_27650_2022_29162: no inheritable or ambient capabilities, at start, in exec and for other users, whose effective
// sets are empty. A runtime that fills the inheritable set, or gives exec the container's sets whoever runs it, fails.
func TestCVE_2022_24769_2022_27650_2022_29162(t *testing.T) {
	w := newWorld(t)
	c := w.config("caps", "status", "say", "ready", "sleep")
	w.start(c)
	w.says(c, "ready")
	none := []string{"status CapInh: 0000000000000000", "status CapAmb: 0000000000000000"}
	nothing := append([]string{"status CapPrm: 0000000000000000", "status CapEff: 0000000000000000"}, none...)
	full := append([]string{"status CapPrm: 00000000a80425fb", "status CapEff: 00000000a80425fb", "status CapBnd: 00000000a80425fb"}, none...)
	lines(t, w.log(c), full...)
	for i, tc := range []struct {
		user specs.User
		priv bool
		want []string
	}{{specs.User{}, false, full}, {specs.User{UID: 1000}, false, nothing}, {specs.User{UID: 1000, GID: 1000}, false, nothing}, {specs.User{}, true, none}} {
		out, err := w.exec("caps", runtime.Process{ID: fmt.Sprintf("x%d", i), Args: []string{"/hostile", "status"}, User: tc.user, Privileged: tc.priv})
		w.must(err)
		lines(t, out, tc.want...)
	}
	w.kill("caps")
	s := w.spec("status")
	s.Process.User.UID = 1000
	s.Process.Capabilities.Effective, s.Process.Capabilities.Permitted = nil, nil
	out, _ := w.ociRun(w.bundle(s, nil))
	lines(t, out, nothing...)
}

// TestCVE_2023_25809: the container's view of its groups cannot be written, whatever namespaces it shares with the host. Where the
// container has no cgroup namespace of its own a writable mount is the host's groups.
func TestCVE_2023_25809(t *testing.T) {
	w := newWorld(t)
	own := sandbox.DefaultSpec().Linux.Namespaces
	for mask := range 1 << 4 {
		shared := map[specs.LinuxNamespaceType]bool{specs.CgroupNamespace: mask&1 != 0, specs.NetworkNamespace: mask&2 != 0,
			specs.IPCNamespace: mask&4 != 0, specs.PIDNamespace: mask&8 != 0}
		c := w.config(fmt.Sprintf("groups%d", mask), "tamper", "/sys/fs/cgroup", "read", "/proc/self/cgroup")
		c.Spec.Linux.Namespaces = nil
		for _, n := range own {
			if !shared[n.Type] {
				c.Spec.Linux.Namespaces = append(c.Spec.Linux.Namespaces, n)
			}
		}
		_, out := w.run(c)
		lines(t, out, `tamper done /sys/fs/cgroup \d{2,}`)
		if strings.Contains(out, "tampered") {
			t.Errorf("shared %v: %s", shared, out)
		}
		s := w.spec("tamper", "/sys/fs/cgroup")
		s.Linux.Namespaces = c.Spec.Linux.Namespaces
		if out, code := w.ociRun(w.bundle(s, nil)); strings.Contains(out, "tampered") || code != 0 || !strings.Contains(out, "tamper done") {
			t.Errorf("OCI, shared %v: %d %s", shared, code, out)
		}
	}
}

// TestProcAndSysLeaks: what engines mask in their newest release shows nothing. The list is theirs, not ours: an entry that our default
// lacks fails.
func TestProcAndSysLeaks(t *testing.T) {
	w := newWorld(t)
	masked := []string{"/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/sched_debug",
		"/proc/scsi", "/proc/timer_list", "/proc/timer_stats", "/sys/devices/virtual/powercap", "/sys/firmware"}
	throttles, err := filepath.Glob("/sys/devices/system/cpu/cpu[0-9]*/thermal_throttle")
	w.must(err)
	masked = append(masked, append(throttles, "/sys/devices/system/cpu/cpu0/thermal_throttle")...)
	n := 0
	for _, p := range masked {
		st, err := os.Stat(p)
		if err != nil {
			continue
		}
		n++
		word := "read"
		want := fmt.Sprintf(`read %s 0 .*`, p)
		if st.IsDir() {
			word, want = "ls", "ls "+p+" <nil>"
		}
		_, out := w.run(w.config(fmt.Sprintf("leak%d", n), word, p))
		lines(t, out, want)
	}
	if n < 4 {
		t.Errorf("only %d of the masked paths are on this host", n)
	}
	have := strings.Join(sandbox.DefaultMaskedPaths(), "\n") + "\n"
	for _, p := range masked {
		if !strings.Contains(have, p+"\n") {
			t.Errorf("%s is not masked by default", p)
		}
	}
}
