package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"skein/test/lab"
)

// TestFirstLight walks the path that everything hangs on, with three managers: publish, resolve, scale, lose the leader, lose a node.
func TestFirstLight(t *testing.T) {
	l := lab.New(t, "e1", 3, 0)
	t.Run("service with six replicas answers on every node", func(t *testing.T) {
		l.Must(0, "network", "create", "-d", "overlay", "backend")
		l.Must(0, "service", "create", "--name", "web", "--replicas", "6", "--network", "backend", "-p", "8080:8080", "--restart-delay", "0s", l.Image("v1"))
		for _, n := range l.Nodes {
			answers(t, l, n.Address, 6, 10*time.Second)
		}
	})
	t.Run("a container resolves another service and reaches it across nodes", func(t *testing.T) { reachAcross(t, l) })
	t.Run("scale to 20 and back to 1", func(t *testing.T) {
		l.Must(1, "service", "scale", "web=20")
		running(t, l, 0, "web", 20, 10*time.Second)
		answers(t, l, l.Nodes[2].Address, 20, 20*time.Second)
		l.Must(2, "service", "scale", "web=1")
		running(t, l, 0, "web", 1, 10*time.Second)
		answers(t, l, l.Nodes[1].Address, 1, 10*time.Second)
		l.Must(2, "service", "scale", "web=6")
	})
	t.Run("kill -9 of the leader's daemon", func(t *testing.T) { killLeader(t, l) })
	t.Run("kill -9 of everything of a node", func(t *testing.T) { killNode(t, l) })
	l.Must(0, "service", "rm", "web", "probe")
}

// answers asks the node's published port until n different hosts have answered, all within limit.
func answers(t *testing.T, l *lab.Lab, addr string, n int, limit time.Duration) {
	t.Helper()
	seen := map[string]bool{}
	l.Eventually(limit, fmt.Sprintf("%d hosts answer on %s", n, addr), func() (bool, string) {
		body, err := lab.Get("http://"+addr+":8080/", 5*time.Second)
		if err != nil {
			return false, err.Error()
		}
		seen[strings.Fields(body)[0]] = true
		return len(seen) >= n, fmt.Sprintf("saw %d", len(seen))
	})
	if len(seen) != n {
		t.Errorf("%s: %d hosts answered, want %d", addr, len(seen), n)
	}
}

type task struct {
	ID, Name, Node, DesiredState, CurrentState, Error string
}

// tasks are the service's tasks with the given desired state, as `docker service ps` shows them.
func tasks(l *lab.Lab, node int, service string) ([]task, error) {
	out, errOut, code := l.Docker(node, "service", "ps", "--no-trunc", "--filter", "desired-state=running", "--format", "json", service)
	if code != 0 {
		return nil, fmt.Errorf("service ps: %s", errOut)
	}
	var list []task
	for _, line := range strings.Split(strings.TrimSpace(out), "\n") {
		if line == "" {
			continue
		}
		var x task
		if err := json.Unmarshal([]byte(line), &x); err != nil {
			return nil, err
		}
		list = append(list, x)
	}
	return list, nil
}

// running waits until exactly n tasks of the service are wanted and run, and returns them.
func running(t *testing.T, l *lab.Lab, node int, service string, n int, limit time.Duration) []task {
	t.Helper()
	var list []task
	l.Eventually(limit, fmt.Sprintf("%d tasks of %s run", n, service), func() (bool, string) {
		var err error
		if list, err = tasks(l, node, service); err != nil {
			return false, err.Error()
		}
		up := 0
		for _, x := range list {
			if strings.HasPrefix(x.CurrentState, "Running") {
				up++
			}
		}
		return up == n && len(list) == n, fmt.Sprintf("%d of %d wanted run", up, len(list))
	})
	return list
}

func reachAcross(t *testing.T, l *lab.Lab) {
	l.Must(0, "service", "create", "--name", "probe", "--mode", "global", "--network", "backend", "-p", "9090:8080", l.Image("v1"))
	for _, entry := range l.Nodes {
		hosts := map[string]bool{}
		l.Eventually(20*time.Second, "probe reaches all replicas of web by name from "+entry.Name, func() (bool, string) {
			body, err := lab.Get("http://"+entry.Address+":9090/fetch?url=http://web:8080/", 5*time.Second)
			if err != nil {
				return false, err.Error()
			}
			f := strings.Fields(body)
			if len(f) < 2 {
				return false, body
			}
			hosts[body] = true
			return len(hosts) >= 6, fmt.Sprintf("%d answers: %q", len(hosts), body)
		})
	}
	body, err := lab.Get("http://"+l.Nodes[0].Address+":9090/resolve?name=tasks.web", 5*time.Second)
	if err != nil || len(ipv4(body)) != 6 {
		t.Errorf("tasks.web resolves to %q (%v), want six addresses", body, err)
	}
	body, err = lab.Get("http://"+l.Nodes[0].Address+":9090/resolve?name=web", 5*time.Second)
	if err != nil || len(ipv4(body)) != 1 {
		t.Errorf("web resolves to %q (%v), want its VIP", body, err)
	}
}

// ipv4 are the IPv4 addresses among the lines.
func ipv4(lines string) []string {
	var out []string
	for _, l := range strings.Fields(lines) {
		if !strings.Contains(l, ":") {
			out = append(out, l)
		}
	}
	return out
}

// leader is the index of the node that leads according to node from.
func leader(t *testing.T, l *lab.Lab, from int) (int, string) {
	t.Helper()
	out, _, code := l.Docker(from, "node", "ls", "--format", "{{.Hostname}} {{.ManagerStatus}}")
	if code == 0 {
		for _, line := range strings.Split(out, "\n") {
			f := strings.Fields(line)
			if len(f) == 2 && f[1] == "Leader" {
				for i, n := range l.Nodes {
					if strings.HasSuffix(f[0], "-"+n.Name) {
						return i, out
					}
				}
			}
		}
	}
	return -1, out
}

// pids are the processes that run in containers of a node: what must not change when daemons die.
func pids(t *testing.T, l *lab.Lab, node int) string {
	t.Helper()
	out := l.Must(node, "ps", "-q", "--no-trunc")
	ids := strings.Fields(out)
	if len(ids) == 0 {
		return ""
	}
	return l.Must(node, append([]string{"inspect", "--format", "{{.Id}} {{.State.Pid}} {{.State.StartedAt}}"}, ids...)...)
}

func killDaemon(t *testing.T, l *lab.Lab, node int) {
	t.Helper()
	n := l.Nodes[node]
	if n.PID == 0 {
		t.Fatalf("%s has no daemon", n.Name)
	}
	fd, err := unix.PidfdOpen(n.PID, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil {
		t.Fatal(err)
	}
	if n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 10_000); n != 1 {
		t.Fatalf("the daemon has not ended: %v", err)
	}
	n.PID = 0
}

func start(t *testing.T, l *lab.Lab, node int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if err := l.Start(ctx, l.Nodes[node]); err != nil {
		t.Fatal(err)
	}
}

func killLeader(t *testing.T, l *lab.Lab) {
	running(t, l, 0, "web", 6, 15*time.Second)
	lead, out := leader(t, l, 0)
	if lead < 0 {
		t.Fatalf("nobody leads:\n%s", out)
	}
	other := (lead + 1) % 3
	before := pids(t, l, lead)
	killDaemon(t, l, lead)
	took := l.Eventually(4*time.Second, "another manager takes writes", func() (bool, string) {
		_, e, code := l.Docker(other, "service", "update", "--detach", "--label-add", "killed=leader", "web")
		return code == 0, e
	})
	t.Logf("a write was taken %v after the leader's death", took.Round(10*time.Millisecond))
	for _, line := range strings.Split(before, "\n") {
		f := strings.Fields(line)
		if len(f) > 1 {
			if _, err := os.Stat("/proc/" + f[1]); err != nil {
				t.Errorf("container %s stopped with the daemon", f[0][:12])
			}
		}
	}
	start(t, l, lead)
	if after := pids(t, l, lead); !sharesAll(before, after) {
		t.Errorf("containers were not adopted as they were:\nbefore\n%s\nafter\n%s", before, after)
	}
	running(t, l, other, "web", 6, 20*time.Second)
}

// sharesAll reports whether every line of before is in after, or its container was retired meanwhile (surplus after a reschedule).
func sharesAll(before, after string) bool {
	have := map[string]string{}
	for _, line := range strings.Split(after, "\n") {
		if f := strings.SplitN(line, " ", 2); len(f) == 2 {
			have[f[0]] = f[1]
		}
	}
	for _, line := range strings.Split(before, "\n") {
		if f := strings.SplitN(line, " ", 2); len(f) == 2 {
			if now, ok := have[f[0]]; ok && now != f[1] {
				return false
			}
		}
	}
	return true
}

func killNode(t *testing.T, l *lab.Lab) {
	victim, watcher := 2, 0
	victimHost := "e1-" + l.Nodes[victim].Name
	if err := l.Kill(l.Nodes[victim]); err != nil {
		t.Fatal(err)
	}
	took := l.Eventually(10*time.Second, "the node's tasks run elsewhere", func() (bool, string) {
		list, err := tasks(l, watcher, "web")
		if err != nil {
			return false, err.Error()
		}
		up := 0
		for _, x := range list {
			if strings.HasPrefix(x.CurrentState, "Running") && x.Node != victimHost {
				up++
			}
		}
		return up == 6, fmt.Sprintf("%d of 6 run elsewhere", up)
	})
	t.Logf("tasks ran elsewhere %v after the node's death", took.Round(10*time.Millisecond))
	start(t, l, victim)
	l.Eventually(10*time.Second, "the node is ready again", func() (bool, string) {
		out := l.Must(watcher, "node", "ls", "--format", "{{.Hostname}} {{.Status}}")
		return strings.Contains(out, victimHost+" Ready"), out
	})
	running(t, l, watcher, "web", 6, 20*time.Second)
	l.Eventually(15*time.Second, "surplus containers end", func() (bool, string) {
		total := 0
		for i := range l.Nodes {
			total += len(strings.Fields(l.Must(i, "ps", "-q", "--filter", "label=com.docker.swarm.service.name=web")))
		}
		return total == 6, fmt.Sprintf("%d containers of web", total)
	})
}
