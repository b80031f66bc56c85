package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// delegatedGroup is what systemd gives a service with Delegate=yes. The daemon is started below it or in it.
const delegatedGroup = groupRoot + "/system.slice/skein.service"

// endDaemon ends daemon, supervisor and what they left; parent must then be removable, the node's own leaf apart.
func (g *guest) endDaemon(parent string) error {
	// The network of a container that was just removed goes a moment later; killed before, it is left to the next daemon.
	err := until(10*time.Second, "namespaces of removed containers", func() bool {
		left, _ := filepath.Glob("/run/skein/netns/*")
		return len(left) == 0
	})
	_ = g.daemon.Process.Kill()
	_ = g.daemon.Wait()
	out, _, cerr := command(30*time.Second, "pidof", "skein")
	err = errors.Join(err, cerr)
	for _, f := range strings.Fields(out) {
		if pid, aerr := strconv.Atoi(f); aerr == nil {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
	}
	var left []string
	entries, rerr := os.ReadDir(groupRoot + parent)
	for _, e := range entries {
		if e.IsDir() && e.Name() != "_node" {
			left = append(left, e.Name())
		}
	}
	if len(left) > 0 {
		err = errors.Join(err, fmt.Errorf("groups left: %v", left))
	}
	if errors.Is(rerr, os.ErrNotExist) {
		rerr = nil
	}
	return errors.Join(err, rerr)
}

func clusterChecks() []check {
	return []check{{"cluster up", clusterUp}, {"cluster service", clusterService}, {"cluster down", clusterDown}}
}

func nodeSocket(n int) string {
	return fmt.Sprintf("/var/lib/skein-dev/vm/n%d/run/skein/skein.sock", n)
}

func clusterUp(g *guest) error {
	out, code, err := command(2*time.Minute, "/bin/skein", "dev", "up", "--name", "vm", "--managers", "1", "--workers", "1")
	if err != nil || code != 0 {
		return fmt.Errorf("dev up: %d %w\n%s\n%s", code, errors.Join(err), out, tail("/var/lib/skein-dev/vm/n1/daemon.log", 20))
	}
	for n := 1; n <= 2; n++ {
		node := &guest{socket: nodeSocket(n)}
		if _, err := node.sk(0, "load", "-i", "/bb.tar"); err != nil {
			return err
		}
	}
	return nil
}

// clusterService runs one replica on each node: they talk over VXLAN, and each node's published port reaches both.
func clusterService(g *guest) error {
	m, w := &guest{socket: nodeSocket(1)}, &guest{socket: nodeSocket(2)}
	if _, err := m.sk(0, "network", "create", "-d", "overlay", "--attachable", "ov"); err != nil {
		return err
	}
	if _, err := m.sk(0, "service", "create", "-d", "--no-resolve-image", "--name", "web", "--network", "ov", "--replicas", "2", "--limit-memory", "64m", "-p", "8080:80", "bb",
		"sh", "-c", "mkdir /w; hostname >/w/index.html; exec httpd -f -p 80 -h /w"); err != nil {
		return err
	}
	var ps string
	if err := until(60*time.Second, "two tasks", func() bool {
		ps, _ = m.sk(0, "service", "ps", "-f", "desired-state=running", "--format", "{{.Node}} {{.CurrentState}}", "web")
		return strings.Count(ps, "Running") == 2
	}); err != nil {
		full, _ := m.sk(0, "service", "ps", "--no-trunc", "web")
		return fmt.Errorf("%w\n%s\n%s", err, full, tail("/var/lib/skein-dev/vm/n1/daemon.log", 20))
	}
	vip := ""
	vips, err := m.sk(0, "service", "inspect", "-f", "{{range .Endpoint.VirtualIPs}}{{println .Addr}}{{end}}", "web")
	for _, v := range strings.Fields(vips) {
		if strings.HasPrefix(v, "10.0.") { // the other is of the published port
			vip, _, _ = strings.Cut(v, "/")
		}
	}
	if err != nil || vip == "" {
		return fmt.Errorf("addresses of the service: %q %w", vips, errors.Join(err))
	}
	for n, node := range []*guest{m, w} {
		addr, err := node.sk(0, "info", "-f", "{{.Swarm.NodeAddr}}")
		if err != nil {
			return err
		}
		if err := bothAnswer(func() string {
			out, _, _ := command(5*time.Second, "wget", "-q", "-O-", "http://"+addr+":8080/")
			return out
		}); err != nil {
			return fmt.Errorf("published port of node %d (%s): %w\n%s", n+1, addr, err, clusterState(node, n+1, addr))
		}
		id, err := node.sk(0, "ps", "-q")
		if err != nil || len(strings.Fields(id)) != 1 {
			return fmt.Errorf("containers of node %d: %q %w", n+1, id, errors.Join(err))
		}
		// By address, since a busybox linked statically against glibc resolves names in nslookup only.
		if names, err := node.sk(0, "exec", id, "nslookup", "web"); err != nil || !strings.Contains(names, vip) {
			return fmt.Errorf("name of the service on node %d: want %s: %s %w", n+1, vip, names, errors.Join(err))
		}
		if err := bothAnswer(func() string { out, _ := node.sk(0, "exec", id, "wget", "-q", "-O-", "http://"+vip+"/"); return out }); err != nil {
			return fmt.Errorf("service address %s from node %d: %w", vip, n+1, err)
		}
		dir := ""
		if _, dir, err = node.where(id); err == nil {
			err = expect("memory.max", read(dir, "memory.max"), "67108864")
		}
		if err != nil {
			return err
		}
		g.note("%s", dir)
	}
	return nil
}

// clusterState is what helps to find out why a port does not answer.
func clusterState(node *guest, n int, addr string) string {
	id, _ := node.sk(0, "ps", "-q")
	inside, _ := node.sk(0, "exec", id, "sh", "-c", "cat /w/index.html; netstat -tln; ip addr; ip route; wget -O- http://127.0.0.1/ 2>&1")
	ns := fmt.Sprintf("/run/netns/skein-vm-n%d", n)
	own, _, _ := command(20*time.Second, "nsenter", "--net="+ns, "sh", "-c", "ip addr; ip route show table all; ip rule; wget -O- http://127.0.0.1:8080/; wget -O- http://"+addr+":8080/; cat /proc/net/nf_conntrack; grep . /proc/sys/net/ipv4/conf/*/rp_filter; lsmod")
	return "in the container:\n" + inside + "\nin the node:\n" + own
}

// bothAnswer asks until two different containers have answered.
func bothAnswer(ask func() string) error {
	seen, last := map[string]bool{}, ""
	err := until(30*time.Second, "answers of both containers", func() bool {
		if last = strings.TrimSpace(ask()); len(last) == 12 {
			seen[last] = true
		}
		return len(seen) == 2
	})
	if err != nil {
		return fmt.Errorf("%w: answered: %v, last: %q", err, seen, last)
	}
	return nil
}

func clusterDown(g *guest) error {
	out, code, err := command(time.Minute, "/bin/skein", "dev", "down", "--name", "vm")
	if err != nil || code != 0 {
		return fmt.Errorf("dev down: %d %w\n%s", code, errors.Join(err), out)
	}
	var left []string
	for _, p := range []string{groupRoot + "/skein-dev", "/var/lib/skein-dev", "/run/netns/skein-*", "/sys/class/net/skd-*"} {
		found, _ := filepath.Glob(p)
		left = append(left, found...)
	}
	if p, _, _ := command(5*time.Second, "pidof", "skein"); strings.TrimSpace(p) != "" {
		left = append(left, "processes "+p)
	}
	if strings.Contains(read("/proc/mounts"), "skein") {
		left = append(left, "mounts: "+read("/proc/mounts"))
	}
	if len(left) > 0 {
		return fmt.Errorf("left: %v", left)
	}
	return nil
}

// startDelegated does what systemd does for a service with Delegate=yes: controllers are on down to the service's own group, and the
// daemon's process, with one more that belongs to it, is in that group.
func startDelegated(g *guest) error {
	for _, d := range []string{"", "/system.slice"} {
		if err := os.MkdirAll(groupRoot+d, 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(groupRoot+d+"/cgroup.subtree_control", []byte("+cpu +cpuset +memory +pids +io"), 0o644); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(delegatedGroup, 0o755); err != nil {
		return err
	}
	return g.startDaemon(delegatedGroup, "--cgroup-parent", strings.TrimPrefix(delegatedGroup, groupRoot))
}

// partlyDelegated: the parent is below a group with processes, which therefore passes no controllers on. Containers run; a limit that
// cannot be had is refused with the reason.
func partlyDelegated(g *guest) error {
	sleeper := exec.Command("sleep", "1000")
	if err := sleeper.Start(); err != nil {
		return err
	}
	defer sleeper.Process.Kill()
	dir := groupRoot + "/busy.slice"
	if err := errors.Join(os.Mkdir(dir, 0o755), os.WriteFile(dir+"/cgroup.procs", []byte(strconv.Itoa(sleeper.Process.Pid)), 0o644)); err != nil {
		return err
	}
	if err := g.startDaemon("", "--cgroup-parent", "/busy.slice/skein", "--run-dir", "/run/skein"); err != nil {
		return err
	}
	out, err := g.sk(0, "run", "--rm", "bb", "echo", "runs")
	if err := errors.Join(err, expect("output", out, "runs")); err != nil {
		return err
	}
	out, err = g.sk(125, "run", "--rm", "--memory", "64m", "bb", "true")
	g.note("%s", out)
	if err == nil && !strings.Contains(out, "busy.slice does not pass it on because it holds processes") {
		err = errors.New(out)
	}
	return errors.Join(err, g.endDaemon("/busy.slice/skein"))
}
