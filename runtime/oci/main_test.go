package oci

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestMain lets the test binary, which is static, be the program inside containers and the hooks too.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "inside" {
		os.Exit(inside(os.Args[2:]))
	}
	if dynamic {
		fmt.Fprintln(os.Stderr, again())
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// again replaces this process by the same tests built without cgo.
func again() error {
	dir, err := os.MkdirTemp("", "skein-oci-test-")
	if err != nil {
		return err
	}
	bin := filepath.Join(dir, "oci.test")
	cmd := exec.Command("go", "test", "-c", "-o", bin, ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if msg, err := cmd.CombinedOutput(); err != nil {
		return errors.Join(fmt.Errorf("build the tests without cgo: %w: %s", err, msg), os.RemoveAll(dir))
	}
	run := exec.Command(bin, os.Args[1:]...)
	run.Stdout, run.Stderr = os.Stdout, os.Stderr
	err = run.Run()
	_ = os.RemoveAll(dir)
	if err != nil {
		return err
	}
	os.Exit(0)
	return nil
}

// report is what a program saw inside, written to /out.
type report struct {
	Files map[string]string
	Host  string
	UID   int
	CWD   string
	Errno map[string]string
	FDs   []string
}

func inside(args []string) int {
	switch args[0] {
	case "sleep":
		time.Sleep(time.Minute)
	case "exit":
		n, _ := strconv.Atoi(args[1])
		return n
	case "hook": // appends its name and its state to a file
		name, file := args[1], args[2]
		var st struct{ Status string }
		if err := json.NewDecoder(os.Stdin).Decode(&st); err != nil {
			return 3
		}
		f, err := os.OpenFile(file, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
		if err != nil {
			return 4
		}
		host, _ := os.Hostname()
		fmt.Fprintf(f, "%s %s %v\n", name, st.Status, host == "inside")
		return 0
	case "tty":
		ws, err := unix.IoctlGetWinsize(0, unix.TIOCGWINSZ)
		fmt.Printf("rows %d %v\n", ws.Row, err)
	case "ask": // a call whose answer somebody else gives
		n, err := unix.Getpgid(1 << 22)
		if fmt.Sprint(n) != args[1] {
			fmt.Println(n, err)
			return 1
		}
	case "see":
		see(args[1:])
	}
	return 0
}

// see writes a report of files and calls.
func see(what []string) {
	r := report{Files: map[string]string{}, Errno: map[string]string{}, UID: os.Getuid()}
	r.Host, _ = os.Hostname()
	r.CWD, _ = os.Getwd()
	fds, _ := os.ReadDir("/proc/self/fd")
	for _, f := range fds {
		l, _ := os.Readlink("/proc/self/fd/" + f.Name())
		r.FDs = append(r.FDs, f.Name()+" "+l)
	}
	_, err := unix.Getpgid(1 << 22) // only filters answer with another error than ESRCH
	r.Errno["getpgid"] = fmt.Sprint(err)
	r.more()
	r.Errno["mkdir"] = fmt.Sprint(unix.Mkdir("/made", 0o755))
	for _, w := range what {
		if l, ok := strings.CutPrefix(w, "stat:"); ok {
			var st unix.Stat_t
			err := unix.Lstat(l, &st)
			r.Files[w] = fmt.Sprintf("%o %d %d:%d %v", st.Mode, st.Uid, unix.Major(uint64(st.Rdev)), unix.Minor(uint64(st.Rdev)), err)
			continue
		}
		b, err := os.ReadFile(w)
		r.Files[w] = string(b)
		if err != nil {
			r.Files[w] = err.Error()
		}
	}
	b, _ := json.Marshal(r)
	_ = os.WriteFile("/out/report", b, 0o666)
}
