// Command hostile is what the attack tests run in containers: a chain of commands, each printing one line per finding.
package main

import (
	"crypto/sha256"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	a := os.Args[1:]
	for len(a) > 0 {
		n := run(a[0], a[1:])
		a = a[1+n:]
	}
}

// run executes one command and returns how many arguments it took.
func run(cmd string, a []string) int {
	switch cmd {
	case "exit":
		n, _ := strconv.Atoi(a[0])
		os.Exit(n)
	case "sleep":
		time.Sleep(time.Hour)
	case "say":
		fmt.Println(a[0])
		return 1
	case "until": // a file exists
		for {
			if _, err := os.Stat(a[0]); err == nil {
				return 1
			}
			time.Sleep(5 * time.Millisecond)
		}
	case "swap": // two names for ever
		swap(a[0], a[1])
	case "spin": // the target of a link, for ever: PATH TARGET TARGET
		spin(a[0], a[1:3])
	case "hunt":
		n, _ := strconv.Atoi(a[1])
		hunt(a[0] == "vandal", n)
		return 2
	default:
		if n, ok := look(cmd, a); ok {
			return n
		}
		return try(cmd, a)
	}
	return 0
}

// look prints what this process can see.
func look(cmd string, a []string) (int, bool) {
	switch cmd {
	case "status":
		b, _ := os.ReadFile("/proc/self/status")
		for l := range strings.Lines(string(b)) {
			for _, p := range []string{"Cap", "NoNewPrivs", "Seccomp:", "Uid", "Gid", "Groups"} {
				if strings.HasPrefix(l, p) {
					fmt.Print("status ", strings.ReplaceAll(l, "\t", " "))
				}
			}
		}
		return 0, true
	case "fds":
		d, _ := os.ReadDir("/proc/self/fd")
		for _, e := range d {
			t, err := os.Readlink("/proc/self/fd/" + e.Name())
			if err == nil && !strings.HasPrefix(t, "anon_inode") && !strings.HasPrefix(t, "/sys/fs/cgroup/") && !strings.HasPrefix(t, "/proc/") { // the Go runtime's
				fmt.Println("fd", e.Name(), t)
			}
		}
		return 0, true
	case "read":
		b, err := os.ReadFile(a[0])
		fmt.Printf("read %s %d %v %q\n", a[0], len(b), err, b[:min(len(b), 200)])
		return 1, true
	case "hash":
		b, err := os.ReadFile(a[0])
		fmt.Printf("hash %s %x %v\n", a[0], sha256.Sum256(b), err)
		return 1, true
	case "ls":
		d, err := os.ReadDir(a[0])
		fmt.Print("ls ", a[0], " ", err)
		for _, e := range d {
			fmt.Print(" ", e.Name())
		}
		fmt.Println()
		return 1, true
	case "stat":
		var st unix.Stat_t
		err := unix.Stat(a[0], &st)
		fmt.Printf("stat %s %o %d:%d %v\n", a[0], st.Mode, unix.Major(st.Rdev), unix.Minor(st.Rdev), err)
		return 1, true
	case "fstype":
		var st unix.Statfs_t
		err := unix.Statfs(a[0], &st)
		fmt.Printf("fstype %s %x %v\n", a[0], uint32(st.Type), err)
		return 1, true
	case "cwd":
		b := make([]byte, 4096)
		n, err := unix.Getcwd(b)
		fmt.Println("cwd", strings.TrimRight(string(b[:max(n, 0)]), "\x00"), err)
		return 0, true
	case "mounts":
		b, _ := os.ReadFile("/proc/self/mountinfo")
		for l := range strings.Lines(string(b)) {
			fmt.Print("mount ", l)
		}
		return 0, true
	case "env":
		for _, e := range os.Environ() {
			fmt.Println("env", e)
		}
		return 0, true
	}
	return 0, false
}

// try prints what became of an attempt.
func try(cmd string, a []string) int {
	switch cmd {
	case "write":
		f, err := os.OpenFile(a[0], os.O_WRONLY, 0)
		if err == nil {
			_, err = f.WriteString(a[1])
			f.Close()
		}
		fmt.Println("write", a[0], err)
		return 2
	case "create":
		f, err := os.OpenFile(a[0], os.O_WRONLY|os.O_CREATE, 0o644)
		if err == nil {
			_, err = f.WriteString("created")
			f.Close()
		}
		fmt.Println("create", a[0], err)
		return 1
	case "mkdir":
		fmt.Println("mkdir", a[0], os.Mkdir(a[0], 0o755))
		return 1
	case "mountcgroup":
		fmt.Println("mountcgroup", syscall.Mount("none", "/tmp", "cgroup", 0, a[0]), syscall.Mount("none", "/tmp", "cgroup2", 0, ""))
		return 1
	case "remount":
		fmt.Println("remount", a[0], syscall.Mount("none", a[0], "", syscall.MS_REMOUNT|syscall.MS_BIND, ""), syscall.Unmount(a[0], 0))
		return 1
	case "nested": // the same from a user namespace of one's own, if it can be had
		fmt.Println("nested", syscall.Unshare(syscall.CLONE_NEWUSER), syscall.Unshare(syscall.CLONE_NEWNS|syscall.CLONE_NEWCGROUP))
	case "seize0": // what standard input is, harmlessly: the host's null device may be at stake
		fmt.Println("seize0", unix.Fchmod(0, 0o1666), unix.Fchown(0, 0, 4242))
	case "guard":
		guard()
	case "exe": // of process 1
		l, err := os.Readlink("/proc/1/exe")
		f, werr := os.OpenFile("/proc/1/exe", os.O_RDWR, 0)
		if werr == nil {
			_, werr = f.WriteString("x")
		}
		fmt.Println("exe", l, err, werr != nil)
	case "trace": // a process, without ever letting go
		pid, _ := strconv.Atoi(a[0])
		runtime.LockOSThread()
		_, _, e := syscall.RawSyscall6(syscall.SYS_PTRACE, 0x4206, uintptr(pid), 0, 0, 0, 0) // PTRACE_SEIZE
		fmt.Println("trace", int(e))
		time.Sleep(time.Hour)
	case "dial":
		c, err := net.Dial("unix", a[0])
		if err == nil {
			c.Close()
		}
		fmt.Println("dial", a[0], err)
		return 1
	case "call": // NAME=NUMBER,ARG,ARG…
		name, spec, _ := strings.Cut(a[0], "=")
		var n [7]uintptr
		for i, s := range strings.Split(spec, ",") {
			v, _ := strconv.ParseUint(s, 0, 64)
			n[i] = uintptr(v)
		}
		_, _, e := syscall.RawSyscall6(n[0], n[1], n[2], n[3], n[4], n[5], n[6])
		fmt.Println("call", name, int(e))
		return 1
	case "connect": // every socket that this network namespace shows, and paths given
		sockets(a[0])
		return 1
	case "tamper":
		tamper(a[0])
		return 1
	default:
		fmt.Println("unknown command", cmd)
		os.Exit(64)
	}
	return 0
}

// guard ends with 3 unless this container is protected: the proc filesystem is real, masked and read-only where it must be, and the null
// device is one.
func guard() {
	bad := func(format string, a ...any) {
		fmt.Printf("unguarded: "+format+"\n", a...)
		os.Exit(3)
	}
	var fs unix.Statfs_t
	if err := unix.Statfs("/proc", &fs); err != nil || fs.Type != unix.PROC_SUPER_MAGIC {
		bad("/proc is of type %x (%v)", fs.Type, err)
	}
	for _, p := range []string{"/proc/keys", "/proc/kcore", "/proc/timer_list", "/proc/interrupts"} {
		f, err := os.Open(p)
		if err != nil {
			continue
		}
		n, _ := f.Read(make([]byte, 1))
		f.Close()
		if n > 0 {
			bad("%s can be read", p)
		}
	}
	for _, p := range []string{"/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/proc/sys/kernel/modprobe", "/proc/irq/default_smp_affinity"} {
		if f, err := os.OpenFile(p, os.O_WRONLY, 0); err == nil {
			f.Close()
			bad("%s can be written", p)
		}
	}
	var st unix.Stat_t
	if err := unix.Stat("/dev/null", &st); err == nil && (st.Mode&unix.S_IFMT != unix.S_IFCHR || st.Rdev != unix.Mkdev(1, 3)) {
		bad("/dev/null is %o %x", st.Mode, st.Rdev)
	}
}

// sockets connects to the unix sockets whose names contain what, and tells who answers.
func sockets(what string) {
	b, _ := os.ReadFile("/proc/net/unix")
	tried := map[string]bool{}
	for l := range strings.Lines(string(b)) {
		f := strings.Fields(l)
		if len(f) < 8 || tried[f[7]] {
			continue
		}
		tried[f[7]] = true
		name := f[7]
		abstract := name[0] == '@'
		if !abstract && !strings.Contains(name, what) {
			continue
		}
		for _, network := range []string{"unix", "unixpacket", "unixgram"} {
			c, err := net.Dial(network, name)
			if err == nil {
				pid := -1
				if u, ok := c.(*net.UnixConn); ok {
					rc, _ := u.SyscallConn()
					_ = rc.Control(func(fd uintptr) {
						if cr, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
							pid = int(cr.Pid)
						}
					})
				}
				fmt.Println("connected", network, name, "abstract", abstract, "pid", pid)
				c.Close()
			}
		}
	}
	fmt.Println("connects done", len(tried) > 0)
}

// tamper opens everything below a path that can be opened for writing and says so.
func tamper(root string) {
	n := 0
	_ = filepath.WalkDir(root, func(p string, d os.DirEntry, err error) error {
		if err != nil {
			return nil
		}
		if d.IsDir() {
			if err := os.Mkdir(filepath.Join(p, "hostile"), 0o755); err == nil {
				fmt.Println("tampered", p)
			}
			return nil
		}
		n++
		if f, err := os.OpenFile(p, os.O_WRONLY|syscall.O_NONBLOCK, 0); err == nil {
			f.Close()
			fmt.Println("tampered", p)
		}
		return nil
	})
	fmt.Println("tamper done", root, n)
}

func swap(a, b string) {
	fmt.Println("ready")
	for {
		_ = unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, unix.RENAME_EXCHANGE)
	}
}

func spin(link string, targets []string) {
	fmt.Println("ready")
	tmp := link + ".new"
	for i := 0; ; i++ {
		_ = os.Symlink(targets[i%len(targets)], tmp)
		_ = os.Rename(tmp, link)
	}
}

// seen keeps distinct findings.
type seen map[string]int

func (s seen) add(format string, a ...any) { s[fmt.Sprintf(format, a...)]++ }

// hunt looks at every process that joins this pid namespace, as early and as often as it can, until n have come or it is told to end. A
// vandal also writes into what it can reach: VICTIM is a pid that it puts wherever numbers are.
func hunt(vandal bool, victim int) {
	found := seen{}
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	var told atomic.Bool
	go func() { <-stop; told.Store(true) }()
	fmt.Println("ready")
	before, misses := 0, 0
	for pid := 2; ; {
		if told.Load() {
			for f, n := range found {
				fmt.Println("found", n, f)
			}
			fmt.Println("hunted", pid, "processes,", before, "looks before execve")
			os.Exit(0)
		}
		dir := "/proc/" + strconv.Itoa(pid)
		if _, err := os.Lstat(dir); err != nil {
			if misses++; misses%2000 == 0 { // numbers may have been skipped
				pid = max(pid, newest())
			}
			continue
		}
		before += stalk(dir, pid, found, vandal, victim, &told)
		pid++
	}
}

// newest is the highest pid, for numbers that were skipped.
func newest() int {
	d, _ := os.Open("/proc")
	defer d.Close()
	names, _ := d.Readdirnames(-1)
	top := 0
	for _, n := range names {
		if v, err := strconv.Atoi(n); err == nil {
			top = max(top, v)
		}
	}
	return top
}

// stalk looks at one process until it has executed or is gone.
func stalk(dir string, pid int, found seen, vandal bool, victim int, told *atomic.Bool) (looks int) {
	for !told.Load() {
		exe, err := os.Readlink(dir + "/exe")
		if exe == "/hostile" || os.IsNotExist(err) {
			return looks
		}
		now := seen{}
		now.add("exe %q %v", exe, errno(err))
		if f, err := os.Open(dir + "/exe"); err == nil {
			if st, err := f.Stat(); err == nil && st.Size() > 0 {
				now.add("exe opened size %v", st.Size() > 0)
			}
			f.Close()
		}
		inspect(dir, now)
		if vandal {
			vandalise(dir, pid, victim, now)
		}
		if after, _ := os.Readlink(dir + "/exe"); after != exe {
			return looks // it executed in between: what was seen may be its own
		}
		looks++
		for f := range now {
			found[f]++
		}
	}
	return looks
}

func errno(err error) any {
	if e, ok := err.(*os.PathError); ok {
		return e.Err
	}
	return err
}

func inspect(dir string, now seen) {
	b, _ := os.ReadFile(dir + "/status")
	for l := range strings.Lines(string(b)) {
		for _, p := range []string{"CapPrm", "CapEff", "CapBnd", "NoNewPrivs", "Seccomp:", "Uid", "Groups"} {
			if strings.HasPrefix(l, p) {
				now.add("%s", strings.Join(strings.Fields(l), " "))
			}
		}
	}
	fds, _ := os.ReadDir(dir + "/fd")
	for _, f := range fds {
		t, err := os.Readlink(dir + "/fd/" + f.Name())
		if err == nil {
			kind, _, _ := strings.Cut(t, ":[")
			now.add("fd %s %s", f.Name(), kind)
		}
	}
	for _, l := range []string{"cwd", "root"} {
		if t, err := os.Readlink(dir + "/" + l); err == nil {
			now.add("%s %s", l, t)
		}
	}
	maps, _ := os.ReadFile(dir + "/maps")
	mem, _ := os.Open(dir + "/mem")
	for l := range strings.Lines(string(maps)) {
		f := strings.Fields(l)
		name := ""
		if len(f) > 5 {
			name = strings.Join(f[5:], " ")
		}
		now.add("map %s %s", f[1], name)
		if mem != nil && strings.HasPrefix(f[1], "r") {
			grep(mem, f[0], now)
		}
	}
	if mem != nil {
		mem.Close()
	}
	if b, err := os.ReadFile(dir + "/environ"); err == nil && len(b) > 0 {
		now.add("environ %q", b[:min(len(b), 40)])
	}
	if b, err := os.ReadFile(dir + "/cmdline"); err == nil && len(b) > 0 {
		now.add("cmdline %q", b[:min(len(b), 40)])
	}
}

// secret marks what only other processes were given.
const secret = "SECRET-OF-ANOTHER"

func grep(mem *os.File, span string, now seen) {
	lo, hi, _ := strings.Cut(span, "-")
	from, _ := strconv.ParseUint(lo, 16, 64)
	to, _ := strconv.ParseUint(hi, 16, 64)
	if to-from > 1<<20 {
		now.add("large map")
		return
	}
	b := make([]byte, to-from)
	n, _ := mem.ReadAt(b, int64(from))
	if strings.Contains(string(b[:n]), secret) {
		now.add("memory with another's secret")
	}
}

// vandalise writes a foreign pid into all memory and pipes of the process.
func vandalise(dir string, pid, victim int, now seen) {
	word := make([]byte, 8)
	for i := range 8 {
		word[i] = byte(victim >> (8 * i))
	}
	if f, err := os.OpenFile(dir+"/fd/3", os.O_WRONLY|syscall.O_NONBLOCK, 0); err == nil {
		for _, w := range [][]byte{word, []byte("YDAER\x00\x00\x00"), make([]byte, 3)} {
			if n, _ := f.Write(w); n > 0 {
				now.add("wrote to descriptor 3")
			}
		}
		f.Close()
	}
	maps, _ := os.ReadFile(dir + "/maps")
	mem, err := os.OpenFile(dir+"/mem", os.O_RDWR, 0)
	if err != nil {
		return
	}
	defer mem.Close()
	for l := range strings.Lines(string(maps)) {
		f := strings.Fields(l)
		if !strings.HasPrefix(f[1], "rw") {
			continue
		}
		lo, _, _ := strings.Cut(f[0], "-")
		from, _ := strconv.ParseUint(lo, 16, 64)
		slots := make([]byte, 0, 8*240)
		for range 240 {
			slots = append(slots, word...)
		}
		if n, _ := mem.WriteAt(slots, int64(from)+64); n > 0 {
			now.add("wrote to memory %s", f[1])
		}
	}
	_, _, e := syscall.RawSyscall6(syscall.SYS_PTRACE, 0x4206, uintptr(pid), 0, 0, 0, 0) // PTRACE_SEIZE
	if e == 0 {
		now.add("traced")
		_, _, _ = syscall.RawSyscall6(syscall.SYS_PTRACE, syscall.PTRACE_DETACH, uintptr(pid), 0, 0, 0, 0)
	}
}
