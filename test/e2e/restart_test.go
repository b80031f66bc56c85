package e2e

import (
	"strings"
	"testing"
	"time"

	"skein/test/lab"
)

// TestAllDaemonsKilled: kill -9 of every daemon at once loses nothing and restarts no container.
func TestAllDaemonsKilled(t *testing.T) {
	l := lab.New(t, "e2", 3, 1)
	l.Must(0, "network", "create", "-d", "overlay", "backend")
	l.Must(0, "service", "create", "--name", "web", "--replicas", "4", "--network", "backend", "-p", "8080:8080", l.Image("v1"))
	describe := func() string {
		return strings.Join([]string{
			l.Must(0, "service", "inspect", "--format", "{{.ID}} {{json .Spec}} {{json .Endpoint}}", "web"),
			l.Must(0, "network", "inspect", "--format", "{{.ID}} {{json .IPAM}}", "backend"),
			l.Must(0, "swarm", "join-token", "-q", "worker"), l.Must(0, "swarm", "join-token", "-q", "manager"),
			l.Must(0, "service", "ps", "--no-trunc", "--format", "{{.ID}} {{.Name}} {{.Node}} {{.DesiredState}}", "web"),
			l.Must(0, "node", "ls", "--format", "{{.ID}} {{.Hostname}} {{.Status}} {{.Availability}}"),
		}, "\n")
	}
	before := describe()
	var containers []string
	for i := range l.Nodes {
		containers = append(containers, pids(t, l, i))
	}
	for i := range l.Nodes {
		killDaemon(t, l, i)
	}
	if body, err := lab.Get("http://"+l.Nodes[3].Address+":8080/", 5*time.Second); err != nil {
		t.Errorf("the published port does not answer while no daemon lives: %v", err)
	} else if !strings.Contains(body, " v1 ") {
		t.Errorf("answer %q", body)
	}
	for i := range l.Nodes {
		start(t, l, i)
	}
	running(t, l, 0, "web", 4, 20*time.Second)
	l.Eventually(20*time.Second, "the cluster is as it was", func() (bool, string) {
		after := describe()
		return before == after, "before\n" + before + "\nafter\n" + after
	})
	for i := range l.Nodes {
		if now := pids(t, l, i); now != containers[i] {
			t.Errorf("containers of %s changed:\nbefore\n%s\nafter\n%s", l.Nodes[i].Name, containers[i], now)
		}
	}
	answers(t, l, l.Nodes[0].Address, 4, 10*time.Second)
}
