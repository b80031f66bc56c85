package dev

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"skein/runtime/cgroup"
)

// Enter runs inside a node what follows it: hidden verb `dev-enter`, executed by the parent that starts daemons and shells. It moves the
// calling process into the node's namespaces and cgroup and replaces it with argv.
type Enter struct {
	Netns   string // path
	RunDir  string // becomes /run in a new mount namespace
	MountOf int    // or: join the mount namespace of this process
	MountNS string // or: join the one of this file
	Cgroup  string // joined before anything else; empty: not
	Argv    []string
	Env     []string
}

// Exec does it; it returns only on error.
func (x Enter) Exec() error {
	runtime.LockOSThread() // the namespaces are this thread's; execve keeps them
	if x.Cgroup != "" {
		if err := cgroup.Join(x.Cgroup, os.Getpid()); err != nil {
			return fmt.Errorf("join cgroup %s: %w", x.Cgroup, err)
		}
	}
	ns, err := os.Open(x.Netns)
	if err != nil {
		return fmt.Errorf("enter network namespace: %w", err)
	}
	defer ns.Close()
	if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter network namespace %s: %w", x.Netns, err)
	}
	switch {
	case x.MountOf != 0:
		err = joinMounts("/proc/" + strconv.Itoa(x.MountOf) + "/ns/mnt")
	case x.MountNS != "":
		err = joinMounts(x.MountNS)
	default:
		err = newMounts(x.RunDir)
	}
	if err != nil {
		return err
	}
	return unix.Exec(x.Argv[0], x.Argv, x.Env)
}

// joinMounts enters the node's mount namespace.
func joinMounts(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("enter mount namespace: %w", err)
	}
	defer f.Close()
	if err := unix.Unshare(unix.CLONE_FS); err != nil { // setns(2): a thread that shares its root cannot change it
		return err
	}
	if err := unix.Setns(int(f.Fd()), unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("enter mount namespace %s: %w", path, err)
	}
	return nil
}

// newMounts makes a mount namespace whose /run is the node's, and whose /sys shows the node's own network devices.
func newMounts(runDir string) error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("new mount namespace: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("private mounts: %w", err)
	}
	if err := dropForeign(filepath.Dir(runDir)); err != nil {
		return err
	}
	if err := unix.Mount(runDir, "/run", "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount %s on /run: %w", runDir, err)
	}
	return nil
}

// dropForeign unmounts the copies of what is not this node's and came with the mount namespace: named network namespaces, and other
// nodes' disks and mount namespaces. They would live for as long as this node does.
func dropForeign(nodeDir string) error {
	b, err := os.ReadFile("/proc/thread-self/mountinfo")
	if err != nil {
		return err
	}
	lines := strings.Split(string(b), "\n")
	clusters := filepath.Dir(filepath.Dir(nodeDir))
	for i := len(lines) - 1; i >= 0; i-- { // the latest mount lies on top
		f := strings.Fields(lines[i])
		if len(f) <= 4 || strings.HasPrefix(f[4], nodeDir+"/") {
			continue
		}
		if f[4] == netnsDir || strings.HasPrefix(f[4], netnsDir+"/") || strings.HasPrefix(f[4], clusters+"/") {
			if err := unix.Unmount(f[4], unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
				return fmt.Errorf("unmount %s: %w", f[4], err)
			}
		}
	}
	return nil
}

// Listener is the process that listens on a unix socket, as the kernel says.
func Listener(socket string) (pid int, err error) {
	conn, err := net.Dial("unix", socket)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	cerr := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err = errors.Join(err, cerr); err != nil {
		return 0, err
	}
	return int(cred.Pid), nil
}

// inside returns a living process whose mount namespace is the node's.
func (c *Cluster) inside(n *Node) (int, error) {
	if pid := c.daemonPID(n); pid != 0 {
		return pid, nil
	}
	if pid, err := Listener(c.supervisor(n)); err == nil {
		return pid, nil
	}
	return 0, errors.New("node " + n.Name + " does not run: start it with `skein dev start " + n.Name + "`")
}

func netnsPath(n *Node) string { return filepath.Join(netnsDir, n.Namespace) }
