package link

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// NS is a network namespace held by a file descriptor.
type NS struct {
	f *os.File
	// own is true when every thread of this process is already in the namespace, so that Do need not switch.
	own   bool
	watch atomic.Pointer[Audit]
}

// Current is the namespace of the calling process.
func Current() (*NS, error) {
	f, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return nil, fmt.Errorf("open this process's network namespace: %w", err)
	}
	return &NS{f: f, own: true}, nil
}

// OpenNS opens the namespace that is bind-mounted at path. A plain file left over from an unfinished CreateNS is os.ErrNotExist.
func OpenNS(path string) (*NS, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open network namespace: %w", err)
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &fs); err != nil {
		f.Close()
		return nil, fmt.Errorf("open network namespace %s: statfs: %w", path, err)
	}
	if fs.Type != unix.NSFS_MAGIC && fs.Type != unix.PROC_SUPER_MAGIC {
		f.Close()
		return nil, fmt.Errorf("open network namespace %s: no namespace is mounted there: %w", path, os.ErrNotExist)
	}
	return &NS{f: f}, nil
}

// NewNS makes a namespace that is gone when nobody holds it any more, at the latest with this process, unless Mount keeps it.
func NewNS() (*NS, error) {
	var f *os.File
	err := onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("unshare: %w", err)
		}
		var err error
		f, err = os.Open("/proc/thread-self/ns/net")
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("create network namespace: %w", err)
	}
	return &NS{f: f}, nil
}

// Mount keeps a namespace alive by a bind mount at path, where nothing is mounted yet.
func (n *NS) Mount(path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("create network namespace: %w", err)
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDONLY|unix.O_NOFOLLOW, 0o444)
	if err != nil {
		return fmt.Errorf("create network namespace: %w", err)
	}
	f.Close()
	if err := unix.Mount(fmt.Sprintf("/proc/self/fd/%d", n.FD()), path, "", unix.MS_BIND, ""); err != nil {
		os.Remove(path)
		return fmt.Errorf("create network namespace %s: mount: %w", path, err)
	}
	return nil
}

// CreateNS makes a new namespace and keeps it alive by a bind mount at path. An existing namespace at path is opened instead.
func CreateNS(path string) (*NS, error) {
	if ns, err := OpenNS(path); err == nil {
		return ns, nil
	}
	ns, err := NewNS()
	if err != nil {
		return nil, err
	}
	if err := ns.Mount(path); err != nil {
		ns.Close()
		return nil, err
	}
	return ns, nil
}

// RemoveNS unmounts and deletes the file of a namespace; it is gone when nothing else holds it. A missing file is not an error.
func RemoveNS(path string) error {
	for {
		err := unix.Unmount(path, unix.MNT_DETACH)
		if errors.Is(err, unix.ENOENT) {
			return nil
		}
		if errors.Is(err, unix.EINVAL) { // no longer a mount point
			break
		}
		if err != nil {
			return fmt.Errorf("remove network namespace %s: unmount: %w", path, err)
		}
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove network namespace: %w", err)
	}
	return nil
}

// Close releases the descriptor; the namespace lives on while it is mounted or used.
func (n *NS) Close() error { return n.f.Close() }

// FD is valid until Close.
func (n *NS) FD() int { return int(n.f.Fd()) }

// Same tells whether both are one namespace.
func (n *NS) Same(o *NS) bool {
	var a, b unix.Stat_t
	if unix.Fstat(n.FD(), &a) != nil || unix.Fstat(o.FD(), &b) != nil {
		return false
	}
	return a.Ino == b.Ino && a.Dev == b.Dev
}

// Do runs fn on a thread inside the namespace. Sockets that fn opens stay in it. fn must not start goroutines that need it.
func (n *NS) Do(fn func() error) error {
	if n.own {
		return fn()
	}
	return onThread(func() error {
		if err := unix.Setns(n.FD(), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace: %w", err)
		}
		return fn()
	})
}

// onThread runs fn on a thread of its own that may change its network namespace. The thread goes back to where it came from and is
// reused; if that fails it ends with its goroutine, because a locked goroutine that returns takes its thread along.
func onThread(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		home, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			runtime.UnlockOSThread()
			done <- fmt.Errorf("open this thread's network namespace: %w", err)
			return
		}
		defer unix.Close(home)
		err = fn()
		if unix.Setns(home, unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
		done <- err
	}()
	return <-done
}

// Sysctl writes values under /proc/sys/net of the namespace; keys are paths like "ipv4/ip_forward". A key that the kernel lacks is an
// error unless it ends in "?".
func (n *NS) Sysctl(kv map[string]string) error {
	return n.Do(func() error {
		if a := n.watch.Load(); a != nil {
			kv = auditSysctl(a, kv)
		}
		for k, v := range kv {
			optional := k[len(k)-1] == '?'
			if optional {
				k = k[:len(k)-1]
			}
			err := writeFile("/proc/sys/net/"+k, v)
			if err != nil && !(optional && errors.Is(err, os.ErrNotExist)) {
				return fmt.Errorf("set sysctl net/%s to %s: %w", k, v, err)
			}
		}
		return nil
	})
}

// writeFile writes a file under /proc in one call. The os package would ask the poller first, twice for each file.
func writeFile(path, v string) error {
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	_, err = unix.Write(fd, []byte(v))
	return err
}

// ReadSysctl reads one value without its line end.
func (n *NS) ReadSysctl(key string) (string, error) {
	var v string
	err := n.Do(func() error {
		b, err := os.ReadFile("/proc/sys/net/" + key)
		if err != nil {
			return fmt.Errorf("read sysctl net/%s: %w", key, err)
		}
		for len(b) > 0 && b[len(b)-1] == '\n' {
			b = b[:len(b)-1]
		}
		v = string(b)
		return nil
	})
	return v, err
}

// NSOfSocket is the namespace that a socket lives in.
func NSOfSocket(c syscall.Conn) (*NS, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("find the namespace of a socket: %w", err)
	}
	var fd int
	var failed error
	err = raw.Control(func(s uintptr) { fd, failed = unix.IoctlRetInt(int(s), unix.SIOCGSKNS) })
	if err = errors.Join(err, failed); err != nil {
		return nil, fmt.Errorf("find the namespace of a socket: %w", err)
	}
	return &NS{f: os.NewFile(uintptr(fd), "net")}, nil
}
