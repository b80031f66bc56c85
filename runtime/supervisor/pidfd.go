package supervisor

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"skein/runtime"
)

// reapWait bounds the wait for somebody else to reap a process of an earlier supervisor: its status can be read only then.
const reapWait = 10 * time.Second

// openPID gives a handle of a process that the poller can wait for.
func openPID(pid int) (*os.File, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("open process %d: %w", pid, err)
	}
	return os.NewFile(uintptr(fd), "pidfd"), nil
}

// control runs f with the descriptor of a file.
func control(f *os.File, do func(fd int) error) error {
	rc, err := f.SyscallConn()
	if err != nil {
		return err
	}
	cerr := rc.Control(func(fd uintptr) { err = do(int(fd)) })
	if cerr != nil {
		return cerr
	}
	return err
}

// sendSignal signals the process of the handle; one that has ended is reported as os.ErrProcessDone.
func sendSignal(f *os.File, sig int) error {
	if f == nil { // gone before it could be adopted
		return os.ErrProcessDone
	}
	err := control(f, func(fd int) error { return unix.PidfdSendSignal(fd, unix.Signal(sig), nil, 0) })
	var errno unix.Errno
	if err != nil && (!errors.As(err, &errno) || errno == unix.ESRCH) { // gone, or its handle closed already
		return os.ErrProcessDone
	}
	return err
}

// awaitEnd waits for the end of a child of ours and returns its exit code; it leaves it to be reaped.
func awaitEnd(f *os.File) (int, error) {
	rc, err := f.SyscallConn()
	if err != nil {
		return 0, err
	}
	var info siginfo
	var werr error
	err = rc.Read(func(fd uintptr) bool {
		info, werr = waitID(fd, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT)
		return werr != nil || info.pid != 0
	})
	if err = errors.Join(err, werr); err != nil {
		return 0, err
	}
	if info.code == cldExited {
		return int(info.status), nil
	}
	return 128 + int(info.status), nil
}

// reapEnded reaps a child of ours that has ended.
func reapEnded(f *os.File) error {
	return control(f, func(fd int) error {
		info, err := waitID(uintptr(fd), unix.WEXITED|unix.WNOHANG)
		if err == nil && info.pid == 0 {
			err = errors.New("it has not ended")
		}
		return err
	})
}

// waitID asks for the end of a process; an empty answer says that it runs.
func waitID(fd, options uintptr) (siginfo, error) {
	for {
		var info siginfo
		_, _, e := unix.Syscall6(unix.SYS_WAITID, unix.P_PIDFD, fd, uintptr(unsafe.Pointer(&info)), options, 0, 0)
		switch e {
		case 0:
			return info, nil
		case unix.EINTR:
		case unix.EAGAIN: // a non-blocking pidfd says so instead of an empty answer
			return siginfo{}, nil
		default:
			return siginfo{}, e
		}
	}
}

// siginfo is what waitid fills, on 64-bit architectures.
type siginfo struct {
	signo, errno, code, _ int32
	pid                   int32
	uid                   uint32
	status                int32
	_                     [100]byte
}

const cldExited = 1

// awaitOther waits for the end of a process whose parent is somebody else and returns its exit code, which the kernel keeps with the
// handle once it was reaped (6.15); otherwise it is unknown.
func awaitOther(f *os.File) (int, error) {
	rc, err := f.SyscallConn()
	if err != nil {
		return 0, err
	}
	code, seen := runtime.UnknownExit, false
	err = rc.Read(func(fd uintptr) bool {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		if n, err := unix.Poll(p, 0); err != nil || n == 0 {
			return false
		}
		st, ok, err := exitInfo(int(fd))
		if ok {
			code = st
			return true
		}
		if err != nil || p[0].Revents&unix.POLLHUP != 0 && seen {
			return true
		}
		if !seen {
			seen = true
			_ = f.SetReadDeadline(time.Now().Add(reapWait))
		}
		return false
	})
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return runtime.UnknownExit, nil
	}
	return code, err
}

const (
	pidfdGetInfo  = 0xc040ff0b
	pidfdInfoExit = 1 << 3
)

// exitInfo asks the kernel for the exit status of a process that was reaped.
func exitInfo(fd int) (code int, ok bool, err error) {
	var info struct {
		mask, cgroup uint64
		ids          [11]uint32
		status       int32
	}
	info.mask = pidfdInfoExit
	_, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), pidfdGetInfo, uintptr(unsafe.Pointer(&info)))
	if e == unix.ESRCH || e == 0 && info.mask&pidfdInfoExit == 0 {
		return 0, false, nil
	}
	if e != 0 {
		return 0, false, e
	}
	ws := unix.WaitStatus(info.status)
	if ws.Signaled() {
		return 128 + int(ws.Signal()), true, nil
	}
	return ws.ExitStatus(), true, nil
}

// reap waits for a child that ends at once.
func reap(pid int) {
	var ws unix.WaitStatus
	for {
		_, err := unix.Wait4(pid, &ws, 0, nil)
		if !errors.Is(err, unix.EINTR) {
			return
		}
	}
}

// startTicks is when the process started, which tells it from a later one of the same number.
func startTicks(pid int) (uint64, error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, err
	}
	i := bytes.LastIndexByte(b, ')')
	if i < 0 {
		return 0, fmt.Errorf("stat of process %d is malformed", pid)
	}
	f := strings.Fields(string(b[i+1:]))
	if len(f) < 20 {
		return 0, fmt.Errorf("stat of process %d is malformed", pid)
	}
	return strconv.ParseUint(f[19], 10, 64)
}

// bootID tells one run of the machine from the next.
func bootID() string {
	b, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b))
}

// getFD copies a descriptor out of another process.
func getFD(pidfd *os.File, n int) (int, error) {
	got := -1
	err := control(pidfd, func(fd int) error {
		var err error
		got, err = unix.PidfdGetfd(fd, n, 0)
		return err
	})
	return got, err
}
