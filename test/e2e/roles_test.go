package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"skein/test/lab"
)

// TestRoles: managers and workers change places in a running cluster, with crashes in between, and no container notices.
func TestRoles(t *testing.T) {
	l := lab.New(t, "e5", 3, 1)
	l.Must(0, "service", "create", "--name", "web", "--mode", "global", l.Image("v1"))
	running(t, l, 0, "web", 4, 20*time.Second)
	var before []string
	for i := range l.Nodes {
		before = append(before, pids(t, l, i))
	}
	unchanged := func(when string) {
		t.Helper()
		for i := range l.Nodes {
			if now := pids(t, l, i); now != before[i] {
				t.Errorf("%s: containers of %s changed:\n%s\n%s", when, l.Nodes[i].Name, before[i], now)
			}
		}
	}

	l.Must(0, "node", "promote", "e5-n4")
	took := manager(t, l, 3)
	t.Logf("worker to manager in %v", took.Round(time.Millisecond))
	managers(t, l, 3, 4)
	unchanged("after the promotion")

	lead, _ := leader(t, l, 3)
	if out := l.Must(lead, "node", "demote", l.Name+"-"+l.Nodes[lead].Name); !strings.Contains(out, "demoted in the swarm") {
		t.Errorf("demote says %q", out)
	}
	took = worker(t, l, lead)
	t.Logf("leader to worker in %v", took.Round(time.Millisecond))
	_, e, code := l.Docker(lead, "node", "ls")
	if code == 0 || !strings.Contains(e, "Worker nodes can't be used to view or modify cluster state") {
		t.Errorf("a worker's node ls: exit code %d, %s", code, e)
	}
	if _, err := os.Stat(filepath.Join(l.Nodes[lead].StateDir, "cluster", "raft")); err == nil {
		t.Errorf("the former manager keeps the raft log, and the cluster's keys in it")
	}
	managers(t, l, 3, 3)
	unchanged("after the demotion")

	// Its daemon is killed between the wish and the deed, in both directions.
	name := l.Name + "-" + l.Nodes[lead].Name
	killDaemon(t, l, lead)
	l.Must(3, "node", "update", "--role", "manager", name)
	start(t, l, lead)
	manager(t, l, lead)
	managers(t, l, lead, 4)
	killDaemon(t, l, lead)
	l.Must(3, "node", "demote", name)
	start(t, l, lead)
	worker(t, l, lead)
	managers(t, l, 3, 3)
	unchanged("after crashes")

	// A node that is removed while it is up stops its tasks; it can join again.
	if _, e, code := l.Docker(3, "node", "rm", name); code == 0 || !strings.Contains(e, "is not down and can't be removed") {
		t.Errorf("remove a node that is up: exit code %d, %s", code, e)
	}
	other, _ := leader(t, l, 3)
	if _, e, code := l.Docker(3, "node", "rm", "--force", l.Name+"-"+l.Nodes[other].Name); code == 0 || !strings.Contains(e, "must be demoted to worker before removal") {
		t.Errorf("remove the leader: exit code %d, %s", code, e)
	}
	l.Must(3, "node", "rm", "--force", name)
	took = l.Eventually(15*time.Second, "the removed node is in no cluster", func() (bool, string) {
		s := l.Must(lead, "info", "--format", "{{.Swarm.LocalNodeState}} {{.Swarm.Error}}")
		return strings.HasPrefix(s, "inactive this node was removed from cluster"), s
	})
	t.Logf("removed node inactive after %v", took.Round(time.Millisecond))
	if left := l.Must(lead, "ps", "-aq"); left != "" {
		t.Errorf("containers left on the removed node: %s", left)
	}
	l.Must(lead, "swarm", "join", "--token", l.Must(3, "swarm", "join-token", "-q", "worker"), l.Nodes[3].Address)
	running(t, l, 3, "web", 4, 20*time.Second)
}

func role(l *lab.Lab, i int) string {
	return l.Must(i, "info", "--format", "{{.Swarm.LocalNodeState}} {{.Swarm.ControlAvailable}} {{.Swarm.Error}}")
}

// manager waits until the node's API answers as a manager's.
func manager(t *testing.T, l *lab.Lab, i int) time.Duration {
	t.Helper()
	return l.Eventually(15*time.Second, l.Nodes[i].Name+" is a manager", func() (bool, string) {
		if s := role(l, i); s != "active true" {
			return false, s
		}
		_, e, code := l.Docker(i, "node", "ls")
		return code == 0, e
	})
}

// worker waits until the node is a worker with nothing of a manager left.
func worker(t *testing.T, l *lab.Lab, i int) time.Duration {
	t.Helper()
	return l.Eventually(15*time.Second, l.Nodes[i].Name+" is a worker", func() (bool, string) {
		_, err := os.Stat(filepath.Join(l.Nodes[i].StateDir, "cluster", "raft"))
		s := role(l, i)
		return s == "active false" && os.IsNotExist(err), s
	})
}

// managers waits until so many members of the Raft group are reachable, one of them leading.
func managers(t *testing.T, l *lab.Lab, through, want int) {
	t.Helper()
	l.Eventually(15*time.Second, "managers", func() (bool, string) {
		s := l.Must(through, "node", "ls", "--format", "{{.Hostname}} {{.Status}} {{.ManagerStatus}}")
		return strings.Count(s, "Reachable") == want-1 && strings.Count(s, "Leader") == 1 && strings.Count(s, "Ready") == 4, s
	})
}
