package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// guestInit is the guest's first process: it leaves the initial root, which cannot be a container's parent, for a tmpfs, mounts what a
// distribution mounts, starts the checks, reaps orphans and turns the machine off.
func guestInit() {
	err := prepare()
	if err == nil {
		err = superviseChecks()
	}
	if err != nil {
		fmt.Println("FAIL guest:", err)
	}
	fmt.Println("DONE guest")
	unix.Sync()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
}

func prepare() error {
	if err := os.Mkdir("/new", 0o755); err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", "/new", "tmpfs", 0, "size=80%,mode=755"); err != nil {
		return fmt.Errorf("mount tmpfs: %w", err)
	}
	entries, err := os.ReadDir("/")
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Name() != "new" && e.Name() != "dev" { // /dev/console is open
			if err := move("/"+e.Name(), "/new/"+e.Name()); err != nil {
				return err
			}
		}
	}
	if err := errors.Join(os.Chdir("/new"), unix.Mount(".", "/", "", unix.MS_MOVE, ""), unix.Chroot("."), os.Chdir("/")); err != nil {
		return fmt.Errorf("switch root: %w", err)
	}
	for _, m := range []struct{ typ, dir, opts string }{{"proc", "/proc", ""}, {"sysfs", "/sys", ""}, {"devtmpfs", "/dev", ""}, {"devpts", "/dev/pts", "gid=5,mode=620,ptmxmode=666"},
		{"tmpfs", "/dev/shm", ""}, {"tmpfs", "/run", ""}, {"tmpfs", "/tmp", ""}, {"cgroup2", "/sys/fs/cgroup", "nsdelegate"}, {"bpf", "/sys/fs/bpf", ""}} {
		_ = os.MkdirAll(m.dir, 0o755)
		if err := unix.Mount(m.typ, m.dir, m.typ, 0, m.opts); err != nil {
			return fmt.Errorf("mount %s: %w", m.dir, err)
		}
	}
	if err := unix.Mount("", "/", "", unix.MS_SHARED|unix.MS_REC, ""); err != nil { // as systemd does
		return err
	}
	os.Setenv("PATH", "/bin:/sbin:/usr/bin:/usr/sbin")
	os.Setenv("HOME", "/root")
	if b, err := exec.Command("/bin/busybox", "--install", "-s").CombinedOutput(); err != nil {
		return fmt.Errorf("install busybox: %w\n%s", err, b)
	}
	if b, err := exec.Command("/bin/busybox", "ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
		return fmt.Errorf("lo: %w\n%s", err, b)
	}
	return unix.Sethostname([]byte("vm"))
}

// move copies a tree to another filesystem and frees the memory of each file at once.
func move(from, to string) error {
	info, err := os.Lstat(from)
	if err != nil {
		return err
	}
	if !info.IsDir() {
		b, err := os.ReadFile(from)
		if err == nil {
			err = os.WriteFile(to, b, info.Mode())
		}
		return errors.Join(err, os.Remove(from))
	}
	if err := os.Mkdir(to, info.Mode()); err != nil {
		return err
	}
	entries, err := os.ReadDir(from)
	for _, e := range entries {
		err = errors.Join(err, move(filepath.Join(from, e.Name()), filepath.Join(to, e.Name())))
	}
	return err
}

func superviseChecks() error {
	runtime.LockOSThread()
	p, err := os.StartProcess("/init", []string{"/init", "checks"}, &os.ProcAttr{Env: os.Environ(), Files: []*os.File{os.Stdin, os.Stdout, os.Stderr}})
	if err != nil {
		return err
	}
	for {
		var ws unix.WaitStatus
		pid, err := unix.Wait4(-1, &ws, 0, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		if pid == p.Pid {
			return nil
		}
	}
}

// guest is what a check works with.
type guest struct {
	socket string // of the daemon that is asked
	daemon *exec.Cmd
	notes  []string
}

func (g *guest) note(format string, a ...any) { g.notes = append(g.notes, fmt.Sprintf(format, a...)) }

type check struct {
	name string
	run  func(*guest) error
}

// guestChecks runs the checks in order, each with the state that the earlier ones left.
func guestChecks() int {
	only, err := regexp.Compile(read("/etc/vm-run"))
	if err != nil {
		fmt.Println("FAIL run:", err)
		return 1
	}
	rel, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	fmt.Printf("INFO kernel %s\n", strings.TrimSpace(string(rel)))
	g := &guest{socket: "/run/skein/skein.sock"}
	for _, c := range append(checks(), unitChecks()...) {
		if !only.MatchString(c.name) && !strings.HasPrefix(c.name, "setup") && !strings.HasSuffix(c.name, " end") {
			continue
		}
		start := time.Now()
		g.notes = nil
		err := c.run(g)
		result := "PASS"
		switch {
		case err != nil && (strings.Contains(err.Error(), "is not built yet") || strings.Contains(err.Error(), "not supported by this version")):
			result = "SKIP"
		case err != nil:
			result = "FAIL"
		}
		fmt.Printf("%s %s %.1fs %s\n", result, c.name, time.Since(start).Seconds(), strings.Join(g.notes, "; "))
		if err != nil {
			fmt.Println("    " + strings.ReplaceAll(err.Error(), "\n", "\n    "))
		}
	}
	return 0
}

// unitChecks run the test binaries that were brought along.
func unitChecks() []check {
	var out []check
	_ = filepath.WalkDir("/unit", func(p string, e os.DirEntry, err error) error {
		if err == nil && e.Name() == "unit.test" {
			out = append(out, check{"unit " + strings.TrimPrefix(filepath.Dir(p), "/unit/"), func(*guest) error {
				ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
				defer cancel()
				cmd := exec.CommandContext(ctx, p, "-test.v", "-test.run="+read("/etc/vm-unit"))
				cmd.Dir, cmd.WaitDelay = filepath.Dir(p), 3*time.Second
				b, err := cmd.CombinedOutput()
				if err == nil {
					return nil
				}
				return fmt.Errorf("%w\n%s", err, brief(string(b)))
			}})
		}
		return nil
	})
	return out
}

// brief keeps of a test's output what is not about success.
func brief(s string) string {
	var keep []string
	for _, l := range strings.Split(s, "\n") {
		if !strings.HasPrefix(strings.TrimSpace(l), "=== ") && !strings.HasPrefix(strings.TrimSpace(l), "--- PASS") {
			keep = append(keep, l)
		}
	}
	return strings.Join(keep[max(0, len(keep)-80):], "\n")
}

// command runs a program and returns what it printed and its exit code.
func command(timeout time.Duration, name string, args ...string) (string, int, error) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.WaitDelay = 2 * time.Second
	b, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if errors.As(err, &exit) && ctx.Err() == nil {
		return string(b), exit.ExitCode(), nil
	}
	if ctx.Err() != nil {
		err = fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), ctx.Err(), b)
	}
	return string(b), 0, err
}

// sk runs skein against the daemon; want is the exit code that it must have.
func (g *guest) sk(want int, args ...string) (string, error) {
	out, code, err := command(60*time.Second, "/bin/skein", append([]string{"-H", "unix://" + g.socket}, args...)...)
	if err == nil && code != want {
		err = fmt.Errorf("skein %s: exit %d, want %d\n%s", strings.Join(args, " "), code, want, out)
	}
	return strings.TrimSpace(out), err
}

// until asks again until cond holds: for what no event tells about.
func until(d time.Duration, what string, cond func() bool) error {
	for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if cond() {
			return nil
		}
	}
	return fmt.Errorf("%s: not within %s", what, d)
}

func read(elem ...string) string {
	b, err := os.ReadFile(filepath.Join(elem...))
	if err != nil {
		return err.Error()
	}
	return strings.TrimSpace(string(b))
}

// expect compares what is with what should be.
func expect(pairs ...string) error {
	var errs []error
	for i := 0; i+2 < len(pairs)+0; i += 3 {
		if pairs[i+1] != pairs[i+2] {
			errs = append(errs, fmt.Errorf("%s: %q, want %q", pairs[i], pairs[i+1], pairs[i+2]))
		}
	}
	return errors.Join(errs...)
}

// startDaemon runs a daemon, in the given group when one is named, and waits until it answers.
func (g *guest) startDaemon(group string, args ...string) error {
	logFile, err := os.OpenFile("/tmp/daemon.log", os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer logFile.Close()
	cmd := exec.Command("/bin/skein", append([]string{"daemon"}, args...)...)
	cmd.Stdout, cmd.Stderr = logFile, logFile
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if group != "" {
		d, err := os.Open(group)
		if err != nil {
			return err
		}
		defer d.Close()
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(d.Fd())
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	g.daemon = cmd
	if err := until(60*time.Second, "daemon", func() bool { _, err := g.sk(0, "version"); return err == nil }); err != nil {
		return fmt.Errorf("%w\n%s", err, tail("/tmp/daemon.log", 20))
	}
	return nil
}

func tail(file string, n int) string {
	l := strings.Split(read(file), "\n")
	return strings.Join(l[max(0, len(l)-n):], "\n")
}
