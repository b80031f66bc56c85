// Command inside is what the tests run in containers.
package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"
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
	case "echo":
		fmt.Println(a[0])
		return 1
	case "err":
		fmt.Fprintln(os.Stderr, a[0])
		return 1
	case "sleep":
		time.Sleep(time.Hour)
	case "term": // exits with 7 on SIGTERM
		c := make(chan os.Signal, 1)
		signal.Notify(c, syscall.SIGTERM)
		fmt.Println("ready")
		<-c
		os.Exit(7)
	case "orphan": // starts a process and ends before it
		_, err := os.StartProcess("/inside", []string{"inside", "pause"}, &os.ProcAttr{})
		fmt.Println("orphan", err)
		os.Exit(0)
	case "pause":
		time.Sleep(20 * time.Millisecond)
	case "orphans": // n of them; waits until the first process has adopted and reaped them all
		n, _ := strconv.Atoi(a[0])
		for range n {
			p, err := os.StartProcess("/inside", []string{"inside", "orphan"}, &os.ProcAttr{})
			if err == nil {
				_, err = p.Wait()
			}
			if err != nil {
				fmt.Println("orphans", err)
			}
		}
		for left := -1; left != 0; time.Sleep(5 * time.Millisecond) {
			left = 0
			d, _ := os.ReadDir("/proc")
			for _, e := range d {
				if pid, err := strconv.Atoi(e.Name()); err == nil && pid != 1 && pid != os.Getpid() {
					left++
				}
			}
		}
		fmt.Println("orphans are gone")
		return 1
	case "eat": // MiB of memory
		n, _ := strconv.Atoi(a[0])
		b := make([]byte, n<<20)
		for i := 0; i < len(b); i += 4096 {
			b[i] = 1
		}
		return 1
	case "status":
		b, _ := os.ReadFile("/proc/self/status")
		for l := range strings.Lines(string(b)) {
			if strings.HasPrefix(l, "Cap") || strings.HasPrefix(l, "NoNewPrivs") || strings.HasPrefix(l, "Seccomp:") || strings.HasPrefix(l, "Uid") || strings.HasPrefix(l, "Gid") || strings.HasPrefix(l, "Groups") || strings.HasPrefix(l, "SigBlk") || strings.HasPrefix(l, "SigIgn") {
				fmt.Print(l)
			}
		}
	case "fds":
		d, _ := os.ReadDir("/proc/self/fd")
		var s []string
		for _, e := range d {
			if t, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && !strings.HasPrefix(t, "anon_inode") && !strings.HasPrefix(t, "/sys/fs/cgroup/cpu/") {
				s = append(s, e.Name()) // the others are the Go runtime's
			}
		}
		fmt.Println("fds", strings.Join(s, " "))
	case "read":
		b, err := os.ReadFile(a[0])
		fmt.Printf("read %s %d %v\n%s", a[0], len(b), err, b)
		return 1
	case "write":
		f, err := os.OpenFile(a[0], os.O_WRONLY|os.O_CREATE, 0o644)
		if err == nil {
			_, err = f.WriteString(a[1])
		}
		fmt.Println("write", a[0], err)
		return 2
	case "ls":
		d, err := os.ReadDir(a[0])
		fmt.Print("ls ", a[0])
		for _, e := range d {
			fmt.Print(" ", e.Name())
		}
		fmt.Println("", err)
		return 1
	case "host":
		h, _ := os.Hostname()
		wd, _ := os.Getwd()
		fmt.Println("host", h, "pid", os.Getpid(), "cwd", wd)
	case "env":
		for _, e := range os.Environ() {
			fmt.Println("env", e)
		}
	case "mount":
		fmt.Println("mount", syscall.Mount("none", "/mnt", "tmpfs", 0, ""))
	case "unshare":
		fmt.Println("unshare", syscall.Unshare(syscall.CLONE_NEWUSER))
	case "keyctl":
		_, _, e := syscall.Syscall(250, 0, 0, 0)
		fmt.Println("keyctl", e)
	case "clone3":
		_, _, e := syscall.RawSyscall(435, 0, 0, 0)
		fmt.Println("clone3", e)
	case "personality":
		_, _, e := syscall.Syscall(135, 0x20000, 0, 0)
		_, _, e2 := syscall.Syscall(135, 0x40000, 0, 0)
		fmt.Println("personality", e, e2)
	case "mknod": // mknod of a host disk must not be openable
		err := syscall.Mknod("/disk", syscall.S_IFBLK|0o600, 254<<8)
		_, err2 := os.Open("/disk")
		fmt.Println("mknod", err, err2)
	case "cat":
		n, err := io.Copy(os.Stdout, os.Stdin)
		fmt.Println("eof", n, err)
	case "tty":
		var ws [4]uint16
		_, _, e := syscall.Syscall(syscall.SYS_IOCTL, 0, syscall.TIOCGWINSZ, uintptr(unsafe.Pointer(&ws)))
		l, _ := os.Readlink("/proc/self/fd/0")
		fmt.Println("tty", e, ws[0], ws[1], l)
		f, err := os.OpenFile("/dev/tty", os.O_RDWR, 0)
		fmt.Println("devtty", err)
		if err == nil {
			f.Close()
		}
		line, _ := bufio.NewReader(os.Stdin).ReadString('\n')
		fmt.Println("got", strings.TrimSpace(line))
	case "count": // lines forever, numbered
		for i := 0; ; i++ {
			fmt.Println("line", i)
			time.Sleep(2 * time.Millisecond)
		}
	case "pour": // without end, as fast as it goes
		b := []byte(strings.Repeat(strings.Repeat("x", 99)+"\n", 300))
		for {
			if _, err := os.Stdout.Write(b); err != nil {
				os.Exit(1)
			}
		}
	case "shell": // repeats lines; "exit N" exits, "eat N" takes MiB of memory
		for in := bufio.NewScanner(os.Stdin); in.Scan(); {
			fmt.Println("said", in.Text())
			if w := strings.Fields(in.Text()); len(w) == 2 {
				run(w[0], w[1:])
			}
		}
		os.Exit(3)
	case "stdout":
		l, err := os.Readlink("/proc/self/fd/1")
		fmt.Println("stdout", l, err)
	case "busy": // lines for ever, numbered, in bursts that end in the middle of a line
		for i := 0; ; i++ {
			fmt.Print("busy ", i, "\nbu")
			fmt.Print("sy ", i, " again\n")
			if i%20 == 19 {
				time.Sleep(time.Millisecond)
			}
		}
	case "wait": // milliseconds
		n, _ := strconv.Atoi(a[0])
		time.Sleep(time.Duration(n) * time.Millisecond)
		return 1
	case "flood":
		n, _ := strconv.Atoi(a[0])
		w := bufio.NewWriter(os.Stdout)
		for i := range n {
			fmt.Fprintln(w, "flood", i)
		}
		w.Flush()
		return 1
	case "fork": // until it fails
		n := 0
		for ; n < 1000; n++ {
			if _, err := os.StartProcess("/inside", []string{"inside", "sleep"}, &os.ProcAttr{}); err != nil {
				fmt.Println("fork failed", err)
				break
			}
		}
		fmt.Println("forked", n < 1000)
	case "spawn": // a process that outlives this one
		p, err := os.StartProcess("/inside", []string{"inside", "sleep"}, &os.ProcAttr{})
		fmt.Println("spawn", p != nil, err)
	case "sysctl":
		b, err := os.ReadFile("/proc/sys/" + a[0])
		fmt.Println("sysctl", a[0], strings.TrimSpace(string(b)), err)
		return 1
	case "rlimit":
		var r syscall.Rlimit
		_ = syscall.Getrlimit(syscall.RLIMIT_NOFILE, &r)
		fmt.Println("files", r.Max)
	}
	return 0
}
