package oci

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// more adds what only calls tell.
func (r *report) more() {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts)
	r.Errno["boottime"] = fmt.Sprint(ts.Sec)
	io, _, _ := unix.Syscall(unix.SYS_IOPRIO_GET, 1, 0, 0)
	r.Errno["ioprio"] = fmt.Sprintf("%d.%d", io>>13, io&0x1fff)
	if a, err := unix.SchedGetAttr(0, 0); err == nil {
		r.Errno["scheduler"] = fmt.Sprintf("%d nice %d flags %d", a.Policy, a.Nice, a.Flags)
	}
	var mode int32
	var mask [128]uint64
	_, _, e := unix.Syscall6(unix.SYS_GET_MEMPOLICY, uintptr(unsafe.Pointer(&mode)), uintptr(unsafe.Pointer(&mask)), uintptr(len(mask)*64), 0, 0, 0)
	r.Errno["mempolicy"] = fmt.Sprintf("%d %d %d", mode, mask[0], e)
	ring, err := unix.KeyctlGetKeyringID(unix.KEY_SPEC_SESSION_KEYRING, false)
	r.Errno["keyring"] = fmt.Sprint(ring, err)
	r.Errno["domain"] = ""
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		r.Errno["domain"] = unix.ByteSliceToString(u.Domainname[:]) + " " + unix.ByteSliceToString(u.Machine[:])
	}
}

// look runs a changed container and shows what it saw.
func (w *world) look(see []string, change func(*specs.Spec)) report {
	w.t.Helper()
	_ = os.Remove(filepath.Join(w.bundle, "rootfs/out/report"))
	s := w.spec(append([]string{"see"}, see...)...)
	s.Linux.Seccomp = nil // it would forbid some questions
	change(s)
	if code := w.run(s); code != 0 {
		w.t.Fatalf("ended with %d", code)
	}
	return w.report()
}

func TestTimeNamespace(t *testing.T) {
	w := newWorld(t)
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
		t.Fatal(err)
	}
	for _, user := range []bool{false, true} {
		r := w.look([]string{"/proc/self/timens_offsets"}, func(s *specs.Spec) {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.TimeNamespace})
			s.Linux.TimeOffsets = map[string]specs.LinuxTimeOffset{"boottime": {Secs: 1000000}, "monotonic": {Secs: -1, Nanosecs: 5}}
			if user {
				_ = os.Chown(filepath.Join(w.bundle, "rootfs"), 100000, 100000)
				s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
				s.Linux.UIDMappings = []specs.LinuxIDMapping{{HostID: 100000, Size: 10}}
				s.Linux.GIDMappings = s.Linux.UIDMappings
			}
		})
		var sec int64
		fmt.Sscan(r.Errno["boottime"], &sec)
		if d := sec - now.Sec - 1000000; d < 0 || d > 600 || strings.Join(strings.Fields(r.Files["/proc/self/timens_offsets"]), " ") != "monotonic -1 5 boottime 1000000 0" {
			t.Errorf("user namespace %v: %s, now %d: %q", user, r.Errno["boottime"], now.Sec, r.Files)
		}
	}
	w.clean()
}

func TestScheduling(t *testing.T) {
	w := newWorld(t)
	r := w.look([]string{"/proc/self/status"}, func(s *specs.Spec) {
		s.Process.IOPriority = &specs.LinuxIOPriority{Class: specs.IOPRIO_CLASS_BE, Priority: 6}
		s.Process.Scheduler = &specs.Scheduler{Policy: specs.SchedBatch, Nice: 7, Flags: []specs.LinuxSchedulerFlag{specs.SchedFlagResetOnFork}}
		s.Process.ExecCPUAffinity = &specs.CPUAffinity{Initial: "0", Final: "0"} // of additional processes only
		s.Linux.MemoryPolicy = &specs.LinuxMemoryPolicy{Mode: specs.MpolBind, Nodes: "0", Flags: []specs.MemoryPolicyFlagType{specs.MpolFStaticNodes}}
		s.Linux.Personality = &specs.LinuxPersonality{Domain: specs.PerLinux32}
		s.Domainname = "example"
	})
	if r.Errno["ioprio"] != "2.6" || r.Errno["scheduler"] != "3 nice 7 flags 1" || r.Errno["mempolicy"] != "32770 1 0" || r.Errno["domain"] == "example x86_64" ||
		!strings.HasPrefix(r.Errno["domain"], "example ") {
		t.Error(r.Errno)
	}
	w.clean()
}

// TestExecFeatures: affinity, keyring and preserved descriptors of an additional process.
func TestExecFeatures(t *testing.T) {
	w := newWorld(t)
	s := w.spec("sleep")
	s.Linux.Seccomp = nil
	s.Process.ExecCPUAffinity = &specs.CPUAffinity{Initial: "0-1", Final: "0"}
	c, err := w.create(s)
	if err == nil {
		err = c.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	p, err := c.Template()
	if err != nil {
		t.Fatal(err)
	}
	p.Args = []string{"/inside", "inside", "see", "/proc/self/status"}
	pid, err := c.Exec(ExecOptions{Process: p})
	if err != nil {
		t.Fatal(err)
	}
	Wait(pid)
	r := w.report()
	if !strings.Contains(r.Files["/proc/self/status"], "Cpus_allowed_list:\t0\n") {
		t.Error(r.Files)
	}
	ring, err := unix.KeyctlGetKeyringID(unix.KEY_SPEC_SESSION_KEYRING, false)
	if r.Errno["keyring"] == fmt.Sprint(ring, err) || strings.Contains(r.Errno["keyring"], "-1") {
		t.Errorf("keyring %s, this process's %d", r.Errno["keyring"], ring)
	}
	if err := c.Delete(true); err != nil {
		t.Error(err)
	}
	w.clean()
}

// TestJoinAll lets a second container join user and mount namespaces of the first too.
func TestJoinAll(t *testing.T) {
	w := newWorld(t)
	_ = os.Chown(filepath.Join(w.bundle, "rootfs"), 100000, 100000)
	first := w.spec("sleep")
	first.Linux.Namespaces = append(first.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace}, specs.LinuxNamespace{Type: specs.TimeNamespace})
	first.Linux.UIDMappings = []specs.LinuxIDMapping{{HostID: 100000, Size: 65536}}
	first.Linux.GIDMappings = first.Linux.UIDMappings
	c, err := w.create(first)
	if err == nil {
		err = c.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	s := w.spec("sleep")
	s.Linux.CgroupsPath += "-second"
	s.Hostname = ""
	s.Root.Path = "/" // of the joined mount namespace
	s.Mounts = nil
	s.Linux.MaskedPaths, s.Linux.ReadonlyPaths = nil, nil
	s.Linux.Namespaces = nil
	kinds := map[specs.LinuxNamespaceType]string{specs.UserNamespace: "user", specs.MountNamespace: "mnt", specs.PIDNamespace: "pid", specs.IPCNamespace: "ipc",
		specs.UTSNamespace: "uts", specs.NetworkNamespace: "net", specs.TimeNamespace: "time"}
	for k, f := range kinds {
		s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: k, Path: fmt.Sprintf("/proc/%d/ns/%s", c.PID(), f)})
	}
	d, err := w.create(s)
	if err != nil {
		t.Error(err)
	} else {
		for _, f := range kinds {
			a, err1 := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", c.PID(), f))
			b, err2 := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", d.PID(), f))
			if a != b || errors.Join(err1, err2) != nil {
				t.Errorf("%s: %s and %s: %v", f, a, b, errors.Join(err1, err2))
			}
		}
		if err := d.Start(); err != nil {
			t.Error(err)
		}
		if err := d.Delete(true); err != nil {
			t.Error(err)
		}
		reap(d.PID())
	}
	if err := c.Delete(true); err != nil {
		t.Error(err)
	}
	w.clean()
}

// TestSeccompActions calls getpgid under each action.
func TestSeccompActions(t *testing.T) {
	w := newWorld(t)
	for act, want := range map[specs.LinuxSeccompAction]string{specs.ActTrace: "function not implemented", specs.ActLog: "no such process",
		specs.ActAllow: "no such process", specs.ActErrno: "exchange full", specs.ActKillProcess: "", specs.ActTrap: ""} {
		rule := specs.LinuxSyscall{Names: []string{"getpgid"}, Action: act}
		if act == specs.ActErrno {
			rule.ErrnoRet = ptr(uint(unix.EXFULL))
		}
		s := w.spec("see")
		s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{rule},
			Flags: []specs.LinuxSeccompFlag{specs.LinuxSeccompFlagLog, specs.LinuxSeccompFlagSpecAllow, "SECCOMP_FILTER_FLAG_TSYNC"}}
		code := w.run(s)
		switch {
		case act == specs.ActKillProcess && code != 128+int(unix.SIGSYS), act == specs.ActTrap && code == 0, want != "" && code != 0:
			t.Errorf("%s: ended with %d", act, code)
		case want != "" && w.report().Errno["getpgid"] != want:
			t.Errorf("%s: %s", act, w.report().Errno["getpgid"])
		}
	}
	w.clean()
}

// agent answers one notification of each listener it is handed, with 4242 for the call.
func agent(l *net.UnixListener, states chan<- specs.ContainerProcessState) error {
	for {
		conn, err := l.AcceptUnix()
		if err != nil {
			return nil
		}
		buf, oob := make([]byte, 1<<16), make([]byte, 64)
		n, on, _, _, err := conn.ReadMsgUnix(buf, oob)
		conn.Close()
		if err != nil {
			return err
		}
		var st specs.ContainerProcessState
		if err := json.Unmarshal(buf[:n], &st); err != nil {
			return err
		}
		msgs, err := unix.ParseSocketControlMessage(oob[:on])
		if err != nil || len(msgs) != 1 {
			return fmt.Errorf("%d messages: %w", len(msgs), err)
		}
		fds, err := unix.ParseUnixRights(&msgs[0])
		if err != nil {
			return err
		}
		states <- st
		req, resp := make([]byte, 80), make([]byte, 24)
		if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fds[0]), 0xc0502100, uintptr(unsafe.Pointer(&req[0]))); e != 0 {
			return fmt.Errorf("receive: %w", e)
		}
		copy(resp, req[:8])
		binary.LittleEndian.PutUint64(resp[8:], 4242)
		if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fds[0]), 0xc0182101, uintptr(unsafe.Pointer(&resp[0]))); e != 0 {
			return fmt.Errorf("send: %w", e)
		}
		unix.Close(fds[0])
	}
}

func TestSeccompNotify(t *testing.T) {
	w := newWorld(t)
	sock := filepath.Join(w.bundle, "agent")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: sock})
	if err != nil {
		t.Fatal(err)
	}
	states, ended := make(chan specs.ContainerProcessState, 4), make(chan error, 1)
	go func() { ended <- agent(l, states) }()
	s := w.spec("ask", "4242")
	s.Annotations = map[string]string{"a": "b"}
	s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, ListenerPath: sock, ListenerMetadata: "mine",
		Flags:    []specs.LinuxSeccompFlag{specs.LinuxSeccompFlagWaitKillableRecv},
		Syscalls: []specs.LinuxSyscall{{Names: []string{"getpgid"}, Action: specs.ActNotify}}}
	for _, nnp := range []bool{true, false} {
		s.Process.NoNewPrivileges = nnp
		c, err := w.create(s)
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		select {
		case st := <-states:
			if st.Pid != c.PID() || st.Metadata != "mine" || len(st.Fds) != 1 || st.Fds[0] != "seccompFd" || st.State.ID != c.rec.ID || st.State.Annotations["a"] != "b" {
				t.Errorf("%+v", st)
			}
		case err := <-ended:
			t.Fatal(err)
		case <-time.After(20 * time.Second):
			t.Fatal("no listener came")
		}
		if code := c.Wait(); code != 0 {
			t.Errorf("ended with %d", code)
		}
		if err := c.Delete(true); err != nil {
			t.Error(err)
		}
	}
	l.Close()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	c, err := w.create(s)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err == nil || !strings.Contains(err.Error(), "listenerPath") || c.Status() != specs.StateStopped {
		t.Errorf("start without an agent: %v, then %s", err, c.Status())
	}
	reap(c.PID())
	if err := c.Delete(true); err != nil {
		t.Error(err)
	}
	w.clean()
}

// TestRecursiveOptions looks at attributes of a bind mount with another below, and of a new filesystem.
func TestRecursiveOptions(t *testing.T) {
	w := newWorld(t)
	below := filepath.Join(w.bundle, "vol/below")
	if err := errors.Join(os.Mkdir(below, 0o755), unix.Mount("tmpfs", below, "tmpfs", 0, "")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(below, unix.MNT_DETACH) })
	r := w.look([]string{"/proc/self/mountinfo"}, func(s *specs.Spec) {
		s.Mounts = append(s.Mounts, specs.Mount{Destination: "/all", Source: "vol", Options: []string{"rbind", "rro", "rnosuid", "rnoexec"}},
			specs.Mount{Destination: "/top", Source: "vol", Options: []string{"rbind", "ro", "nodev"}},
			specs.Mount{Destination: "/new", Type: "tmpfs", Options: []string{"rro", "size=4k", "mode=700"}})
	})
	got := map[string]string{}
	for line := range strings.Lines(r.Files["/proc/self/mountinfo"]) {
		f := strings.Fields(line)
		got[f[4]] = f[5]
	}
	for dst, want := range map[string]string{"/all": "ro,nosuid,noexec,relatime", "/all/below": "ro,nosuid,noexec,relatime", "/top": "ro,nodev,relatime", "/top/below": "rw,relatime", "/new": "ro,relatime"} {
		if got[dst] != want {
			t.Errorf("%s: %q, want %q", dst, got[dst], want)
		}
	}
	w.clean()
}
