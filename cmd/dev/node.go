package dev

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"skein/runtime/cgroup"
)

const (
	startWait = 20 * time.Second // a daemon that does not answer by then is broken
	killWait  = 10 * time.Second // the kernel has to end everything in a node's cgroup
	probeStep = 20 * time.Millisecond
)

// startDaemon runs the node's daemon, in the mount namespace of what still lives of the node, and waits until its API answers.
func (c *Cluster) startDaemon(ctx context.Context, n *Node) error {
	if pid := c.daemonPID(n); pid != 0 {
		return fmt.Errorf("node %s runs already (pid %d)", n.Name, pid)
	}
	for _, d := range []string{n.StateDir, filepath.Join(c.runDir(n), "skein")} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return err
		}
	}
	c.weigh(n)
	args := []string{"dev-enter", "--netns", netnsPath(n), "--cgroup", c.cgroup(n) + "/daemon"}
	if mounted(c.mounts(n)) {
		args = append(args, "--mount-ns", c.mounts(n))
	} else {
		args = append(args, "--run-dir", c.runDir(n))
	}
	args = append(args, "--", c.Binary, "daemon",
		"--hostname", c.Name+"-"+n.Name, "--state-dir", n.StateDir, "--run-dir", "/run/skein", "--socket", "/run/skein/skein.sock",
		"--advertise-addr", n.Address, "--cgroup-parent", c.cgroup(n), "--insecure-registry", c.Subnet.String(), "--insecure-registry", c.subnet6().String())
	args = append(args, c.Flags...)
	log, err := os.OpenFile(c.logPath(n), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(c.Binary, args...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start node %s: %w", n.Name, err)
	}
	if err := os.WriteFile(filepath.Join(c.nodeDir(n), "daemon.pid"), []byte(strconv.Itoa(cmd.Process.Pid)), 0o600); err != nil {
		_ = cmd.Process.Kill()
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }() // reaps it; whoever started the cluster may live longer than the daemon
	if err := c.awaitAPI(ctx, n, ended); err != nil {
		return err
	}
	return c.keepMounts(n)
}

// Shares of the processor, of 1024 that a process or group has unless told.
const (
	clustersShares = 16 << 10 // all development clusters against everything else on this machine
	daemonShares   = 10 << 10 // a node's daemon and supervisor against each of its containers
)

// weigh keeps the node from being starved: its group would count as one process of this machine, as many as there are, and with it the
// daemons of all nodes: with 30 busy processes beside them three managers changed their leader nine times a minute, with this not once.
// A host that cannot weigh has nothing better.
func (c *Cluster) weigh(n *Node) {
	_ = cgroup.Weigh(cgroupRoot, clustersShares)
	_ = cgroup.Weigh(c.cgroup(n)+"/daemon", daemonShares)
}

// mounts is where the node's mount namespace is kept: a machine keeps its mounts when all of Skein's processes die.
func (c *Cluster) mounts(n *Node) string { return filepath.Join(c.nodeDir(n), "mounts") }

func (c *Cluster) keepMounts(n *Node) error {
	path := c.mounts(n)
	if mounted(path) {
		return nil
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDONLY, 0o400)
	if err != nil {
		return err
	}
	f.Close()
	if err := unix.Mount(fmt.Sprintf("/proc/%d/ns/mnt", n.PID), path, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("keep the mount namespace of node %s: %w", n.Name, err)
	}
	return nil
}

func (c *Cluster) logPath(n *Node) string { return filepath.Join(c.nodeDir(n), "daemon.log") }

// awaitAPI returns when the node's socket answers a ping.
func (c *Cluster) awaitAPI(ctx context.Context, n *Node, ended <-chan error) error {
	ctx, cancel := context.WithTimeout(ctx, startWait)
	defer cancel()
	client := httpClient(n)
	defer client.CloseIdleConnections()
	tick := time.NewTicker(probeStep)
	defer tick.Stop()
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://skein/_ping", nil)
		if err != nil {
			return err
		}
		if resp, err := client.Do(req); err == nil {
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				n.PID = c.daemonPID(n)
				return nil
			}
		}
		select {
		case err := <-ended:
			return fmt.Errorf("the daemon of node %s ended at its start (%v); the end of its log %s:\n%s", n.Name, err, c.logPath(n), tail(c.logPath(n), 15))
		case <-ctx.Done():
			return fmt.Errorf("the daemon of node %s did not answer within %v; the end of its log %s:\n%s", n.Name, startWait, c.logPath(n), tail(c.logPath(n), 15))
		case <-tick.C:
		}
	}
}

func httpClient(n *Node) *http.Client {
	return &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", n.Socket)
	}}}
}

func tail(path string, lines int) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	all := strings.Split(strings.TrimSpace(string(b)), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// kill ends everything of the node with SIGKILL: daemon, supervisor, containers.
func (c *Cluster) kill(n *Node) error {
	if err := cgroup.KillTree(c.cgroup(n)); err != nil {
		return fmt.Errorf("kill node %s: %w", n.Name, err)
	}
	// A killed group is not used again: kernels with cgroup.kill counters (6.18 at least) kill at once what is cloned from a process in
	// a group that was ever killed into one that was not, which is how containers are made.
	if err := cgroup.RemoveTree(c.cgroup(n)); err != nil {
		return fmt.Errorf("kill node %s: %w", n.Name, err)
	}
	for unix.Unmount(c.mounts(n), unix.MNT_DETACH) == nil { // what was mounted goes, too
	}
	if err := os.Remove(filepath.Join(c.nodeDir(n), "daemon.pid")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	n.PID = 0
	return nil
}
