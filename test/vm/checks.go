package main

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const groupRoot = "/sys/fs/cgroup"

// checks are what is tried, in order: one node with its groups below /skein, then a cluster, then a node in a delegated group.
func checks() []check {
	list := []check{{"setup daemon", startPlain}}
	list = append(list, nodeChecks("plain ")...)
	list = append(list, check{"plain end", func(g *guest) error { return g.endDaemon("/skein") }})
	list = append(list, clusterChecks()...)
	list = append(list, check{"setup delegated daemon", startDelegated})
	list = append(list, nodeChecks("delegated ")...)
	return append(list, check{"delegated end", func(g *guest) error { return g.endDaemon("/system.slice/skein.service") }},
		check{"partly delegated", partlyDelegated})
}

// nodeChecks use one node.
func nodeChecks(prefix string) []check {
	list := []check{{"info", info}, {"exit code", exitCode}, {"limits", limits}, {"limits changed", limitsChanged}, {"OOM kill", oom}, {"OOM kill of a child", oomChild},
		{"process count", pidsLimit}, {"cgroup view", cgroupView}, {"devices", devices}, {"pause", pauseCheck}, {"exec", execCheck}, {"stats", stats}, {"stop and rm", stopRemove},
		{"bridge network", bridgeNetwork}, {"daemon killed", daemonKilled}, {"supervisor killed", supervisorKilled}}
	for i := range list {
		list[i].name = prefix + list[i].name
	}
	return list
}

func startPlain(g *guest) error {
	g.note("controllers %s", read(groupRoot, "cgroup.controllers"))
	if err := g.startDaemon(""); err != nil {
		return err
	}
	out, err := g.sk(0, "load", "-i", "/bb.tar")
	g.note("%s", out)
	return err
}

func info(g *guest) error {
	out, err := g.sk(0, "info", "-f", "{{.CgroupVersion}} {{.KernelVersion}} {{len .Warnings}}")
	g.note("%s", out)
	if err == nil && !strings.HasPrefix(out, "2 ") {
		err = fmt.Errorf("info: %s", out)
	}
	return err
}

func exitCode(g *guest) error {
	start := time.Now()
	out, err := g.sk(7, "run", "--rm", "bb", "sh", "-c", "echo hello; exit 7")
	g.note("%d ms", time.Since(start).Milliseconds())
	return errors.Join(err, expect("output", out, "hello"))
}

// running starts a container and returns its id, its process and its group.
func (g *guest) running(args ...string) (id string, pid int, dir string, err error) {
	id, err = g.sk(0, append([]string{"run", "-d"}, args...)...)
	if err != nil {
		return "", 0, "", err
	}
	pid, dir, err = g.where(id)
	return id, pid, dir, err
}

func (g *guest) where(id string) (pid int, dir string, err error) {
	p, err := g.sk(0, "inspect", "-f", "{{.State.Pid}}", id)
	if err != nil {
		return 0, "", err
	}
	pid, err = strconv.Atoi(p)
	if err != nil || pid == 0 {
		return 0, "", fmt.Errorf("pid %q of %s", p, id)
	}
	return pid, groupRoot + strings.TrimPrefix(read("/proc", p, "cgroup"), "0::"), nil
}

// with runs a check with a container that is removed afterwards and must leave no group.
func (g *guest) with(args []string, do func(id string, pid int, dir string) error) error {
	id, pid, dir, err := g.running(args...)
	if err != nil {
		return err
	}
	err = do(id, pid, dir)
	_, rerr := g.sk(0, "rm", "-f", id)
	if _, serr := os.Stat(dir); serr == nil {
		rerr = errors.Join(rerr, fmt.Errorf("%s is left", dir))
	}
	return errors.Join(err, rerr)
}

func limits(g *guest) error {
	return g.with([]string{"--memory", "64m", "--memory-reservation", "32m", "--cpus", "0.5", "--pids-limit", "50", "--cpu-shares", "512", "--cpuset-cpus", "1", "bb", "sleep", "1000"}, func(_ string, _ int, dir string) error {
		weight := read(dir, "cpu.weight")
		g.note("%s weight %s", dir, weight)
		return expect("memory.max", read(dir, "memory.max"), "67108864", "memory.low", read(dir, "memory.low"), "33554432", "cpu.max", read(dir, "cpu.max"), "50000 100000",
			"pids.max", read(dir, "pids.max"), "50", "cpuset.cpus", read(dir, "cpuset.cpus"), "1", "cpuset.cpus.effective", read(dir, "cpuset.cpus.effective"), "1",
			"cpu.weight", weight, "20", "events", read(dir, "cgroup.events"), "populated 1\nfrozen 0")
	})
}

func limitsChanged(g *guest) error {
	return g.with([]string{"--memory", "64m", "bb", "sleep", "1000"}, func(id string, _ int, dir string) error {
		if _, err := g.sk(0, "update", "--memory", "128m", "--memory-swap", "256m", "--pids-limit", "77", "--cpus", "1.5", id); err != nil {
			return err
		}
		if err := expect("memory.max", read(dir, "memory.max"), "134217728", "memory.swap.max", read(dir, "memory.swap.max"), "134217728", "pids.max", read(dir, "pids.max"), "77", "cpu.max", read(dir, "cpu.max"), "150000 100000"); err != nil {
			return err
		}
		_, err := g.sk(0, "update", "--memory", "32m", "--memory-swap", "32m", id)
		return errors.Join(err, expect("memory.max", read(dir, "memory.max"), "33554432", "memory.swap.max", read(dir, "memory.swap.max"), "0"))
	})
}

func (g *guest) oomOf(want string, cmd ...string) error {
	id, err := g.sk(0, append([]string{"run", "-d", "--memory", "24m", "--memory-swap", "24m", "bb"}, cmd...)...)
	if err != nil {
		return err
	}
	code, err := g.sk(0, "wait", id)
	if err != nil {
		return err
	}
	out, err := g.sk(0, "inspect", "-f", "{{.State.ExitCode}} {{.State.OOMKilled}} {{.State.Status}}", id)
	_, rerr := g.sk(0, "rm", id)
	return errors.Join(err, rerr, expect("wait", code, strings.Fields(want)[0], "state", out, want))
}

func oom(g *guest) error { return g.oomOf("137 true exited", "tail", "/dev/zero") }

func oomChild(g *guest) error {
	return g.oomOf("3 true exited", "sh", "-c", "tail /dev/zero & wait $!; exit 3")
}

func pidsLimit(g *guest) error {
	return g.with([]string{"--pids-limit", "10", "bb", "sh", "-c", "sh -c 'for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do sleep 1000 & done'; exec sleep 1000"}, func(id string, _ int, dir string) error {
		if err := until(10*time.Second, "refused fork", func() bool { return !strings.HasSuffix(read(dir, "pids.events"), " 0") }); err != nil {
			return err
		}
		n, err := strconv.Atoi(read(dir, "pids.current"))
		if err == nil && (n < 8 || n > 10) {
			err = fmt.Errorf("%d processes of 10", n)
		}
		return err
	})
}

func cgroupView(g *guest) error {
	return g.with([]string{"--memory", "48m", "bb", "sleep", "1000"}, func(id string, _ int, dir string) error {
		self, err := g.sk(0, "exec", id, "cat", "/proc/self/cgroup")
		mem, err2 := g.sk(0, "exec", id, "cat", "/sys/fs/cgroup/memory.max")
		mounts, err3 := g.sk(0, "exec", id, "grep", "cgroup", "/proc/mounts")
		w, err4 := g.sk(1, "exec", id, "sh", "-c", "echo max > /sys/fs/cgroup/memory.max")
		m, err5 := g.sk(1, "exec", id, "mkdir", "/sys/fs/cgroup/x")
		g.note("%s", mounts)
		err = errors.Join(err, err2, err3, err4, err5, expect("own group", self, "0::/", "memory.max inside", mem, "50331648", "memory.max after", read(dir, "memory.max"), "50331648"))
		if !strings.Contains(w, "Read-only") || !strings.Contains(m, "Read-only") || !strings.Contains(mounts, " ro,") {
			err = errors.Join(err, fmt.Errorf("writable? %s %s %s", w, m, mounts))
		}
		return err
	})
}

// devices: nodes can be made, but only the usual ones opened; a device that was asked for can.
func devices(g *guest) error {
	out, err := g.sk(0, "run", "--rm", "bb", "sh", "-c", "mknod /tmp/k c 1 11 && mknod /tmp/n c 1 3 && (cat /tmp/n && echo null; head -c1 /dev/zero | wc -c; echo x >/tmp/k) 2>&1; true")
	if err != nil || !strings.Contains(out, "null") || !strings.Contains(out, "1") || !strings.Contains(out, "not permitted") {
		return fmt.Errorf("inside: %s %w", out, errors.Join(err))
	}
	out, err = g.sk(0, "run", "--rm", "--cap-add", "SYSLOG", "--device", "/dev/kmsg:/dev/k:r", "bb", "sh", "-c", "head -n1 /dev/k | wc -l; (echo x >/dev/k) 2>&1; true")
	if err != nil || !strings.HasPrefix(out, "1") || !strings.Contains(out, "not permitted") {
		return fmt.Errorf("with --device kmsg:r: %s %w", out, errors.Join(err))
	}
	return nil
}

func pauseCheck(g *guest) error {
	return g.with([]string{"bb", "sleep", "1000"}, func(id string, pid int, dir string) error {
		if _, err := g.sk(0, "pause", id); err != nil {
			return err
		}
		st, err := g.sk(0, "inspect", "-f", "{{.State.Status}}", id)
		if err := errors.Join(err, expect("status", st, "paused", "freeze", read(dir, "cgroup.freeze"), "1", "events", read(dir, "cgroup.events"), "populated 1\nfrozen 1")); err != nil {
			return err
		}
		if _, err := g.sk(0, "unpause", id); err != nil {
			return err
		}
		if err := until(5*time.Second, "thaw", func() bool { return strings.Contains(read(dir, "cgroup.events"), "frozen 0") }); err != nil {
			return err
		}
		if _, err := g.sk(0, "pause", id); err != nil {
			return err
		}
		_, err = g.sk(0, "kill", id) // a frozen container dies
		code, err2 := g.sk(0, "wait", id)
		return errors.Join(err, err2, expect("exit", code, "137"))
	})
}

func execCheck(g *guest) error {
	return g.with([]string{"--memory", "48m", "bb", "sleep", "1000"}, func(id string, pid int, dir string) error {
		_, err := g.sk(9, "exec", id, "sh", "-c", "exit 9")
		_, err2 := g.sk(0, "exec", "-d", id, "sleep", "999")
		if err := errors.Join(err, err2, until(5*time.Second, "second process in the group", func() bool { return len(strings.Fields(read(dir, "cgroup.procs"))) == 2 })); err != nil {
			return err
		}
		_, err = g.sk(137, "exec", id, "tail", "/dev/zero") // over the limit: the exec dies, the container lives
		st, err2 := g.sk(0, "inspect", "-f", "{{.State.Status}}", id)
		top, err3 := g.sk(0, "top", id)
		if !strings.Contains(top, "sleep 999") {
			err3 = errors.Join(err3, fmt.Errorf("top: %s", top))
		}
		return errors.Join(err, err2, err3, expect("status", st, "running"))
	})
}

func stats(g *guest) error {
	return g.with([]string{"--memory", "64m", "bb", "sh", "-c", "while :; do :; done"}, func(id string, _ int, dir string) error {
		out, err := g.sk(0, "stats", "--no-stream", "--format", "{{.CPUPerc}} {{.MemUsage}} {{.PIDs}}", id)
		g.note("%s", out)
		if err == nil && (!strings.Contains(out, "/ 64MiB") || strings.HasPrefix(out, "0.00%") || strings.Contains(out, " 0B /") || !strings.HasSuffix(out, " 1")) {
			err = fmt.Errorf("stats: %s", out)
		}
		return err
	})
}

func stopRemove(g *guest) error {
	err := g.with([]string{"bb", "sh", "-c", "trap 'exit 5' TERM; while :; do sleep 0.1; done"}, func(id string, _ int, dir string) error {
		if err := until(5*time.Second, "trap", func() bool { return len(strings.Fields(read(dir, "cgroup.procs"))) >= 2 }); err != nil {
			return err
		}
		_, err := g.sk(0, "stop", id)
		code, err2 := g.sk(0, "inspect", "-f", "{{.State.ExitCode}} {{.State.Pid}}", id)
		if err := errors.Join(err, err2, expect("state", code, "5 0")); err != nil {
			return err
		}
		_, err = g.sk(0, "start", id)
		return err
	})
	return errors.Join(err, g.with([]string{"bb", "sleep", "1000"}, func(id string, _ int, _ string) error {
		_, err := g.sk(0, "stop", "-t", "1", id)
		code, err2 := g.sk(0, "inspect", "-f", "{{.State.ExitCode}} {{.State.OOMKilled}}", id)
		return errors.Join(err, err2, expect("state", code, "137 false"))
	}))
}

func bridgeNetwork(g *guest) error {
	return g.with([]string{"-p", "18080:80", "bb", "sh", "-c", "mkdir /w; echo served >/w/index.html; httpd -f -p 80 -h /w"}, func(id string, _ int, _ string) error {
		ip, err := g.sk(0, "inspect", "-f", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", id)
		if err != nil {
			return err
		}
		for _, url := range []string{"http://" + ip + "/", "http://127.0.0.1:18080/"} {
			var out string
			if err := until(10*time.Second, url, func() bool {
				out, _, _ = command(5*time.Second, "wget", "-q", "-O-", url)
				return strings.TrimSpace(out) == "served"
			}); err != nil {
				return fmt.Errorf("%w: %s", err, out)
			}
		}
		return nil
	})
}

// daemonKilled: the next daemon adopts what runs.
func daemonKilled(g *guest) error {
	return g.with([]string{"bb", "sh", "-c", "i=0; while :; do i=$((i+1)); echo $i; sleep 0.2; done"}, func(id string, pid int, dir string) error {
		_ = g.daemon.Process.Kill()
		_ = g.daemon.Wait()
		if err := g.startDaemon(g.group(), g.daemon.Args[2:]...); err != nil {
			return err
		}
		now, _, err := g.where(id)
		if err := errors.Join(err, expect("pid", strconv.Itoa(now), strconv.Itoa(pid))); err != nil {
			return err
		}
		lines := func() int { out, _ := g.sk(0, "logs", id); return len(strings.Fields(out)) }
		n := lines()
		return until(10*time.Second, "more log lines", func() bool { return lines() > n })
	})
}

// group is where the daemon's first process started.
func (g *guest) group() string {
	if g.daemon.SysProcAttr.UseCgroupFD {
		return delegatedGroup + "/_node" // systemd 254 and later start it there with DelegateSubgroup=
	}
	return ""
}

// supervisorKilled: containers live on, are stopped and counted by the next supervisor.
func supervisorKilled(g *guest) error {
	code := ""
	err := g.with([]string{"bb", "sh", "-c", "trap 'exit 6' TERM; while :; do echo x; sleep 0.1; done"}, func(id string, pid int, dir string) error {
		super := parent(pid)
		if super <= 1 {
			return fmt.Errorf("parent of the container is %d", super)
		}
		if err := unix.Kill(super, unix.SIGKILL); err != nil {
			return err
		}
		if err := until(10*time.Second, "new supervisor", func() bool { out, err := g.sk(0, "exec", id, "echo", "there"); return err == nil && out == "there" }); err != nil {
			return err
		}
		now, _, err := g.where(id)
		if err := errors.Join(err, expect("pid", strconv.Itoa(now), strconv.Itoa(pid))); err != nil {
			return err
		}
		_, err = g.sk(0, "stop", id)
		var err2 error
		code, err2 = g.sk(0, "inspect", "-f", "{{.State.Status}} {{.State.ExitCode}} {{.State.Error}}", id)
		g.note("after: %s", code)
		if !strings.HasPrefix(code, "exited ") {
			err2 = errors.Join(err2, fmt.Errorf("after stop: %s", code))
		}
		return errors.Join(err, err2)
	})
	if err != nil {
		return err
	}
	_, err = g.sk(4, "run", "--rm", "bb", "sh", "-c", "exit 4")
	return err
}

func parent(pid int) int {
	for _, l := range strings.Split(read("/proc", strconv.Itoa(pid), "status"), "\n") {
		if v, ok := strings.CutPrefix(l, "PPid:"); ok {
			n, _ := strconv.Atoi(strings.TrimSpace(v))
			return n
		}
	}
	return 0
}
