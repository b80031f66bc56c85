package e2e

import (
	"net"
	"strings"
	"testing"

	"skein/test/lab"
)

// TestErrorsSayTheFix: what goes wrong names the object, the cause and the fix, with an exit code.
func TestErrorsSayTheFix(t *testing.T) {
	l := lab.New(t, "e3", 1, 1)
	l.Must(0, "service", "create", "--name", "web", "-p", "8080:8080", l.Image("v1"))
	token := l.Must(0, "swarm", "join-token", "-q", "worker")
	free, err := net.Listen("tcp", l.HostAddr().String()+":0")
	if err != nil {
		t.Fatal(err)
	}
	down := free.Addr().String()
	free.Close()
	for _, c := range []struct {
		name string
		node int
		args []string
		want []string
	}{
		{"unknown service", 0, []string{"service", "inspect", "nosuch"}, []string{"nosuch", "no such service"}},
		{"unknown service scaled", 0, []string{"service", "scale", "nosuch=3"}, []string{"nosuch"}},
		{"negative scale", 0, []string{"service", "scale", "web=-1"}, []string{"web", "-1"}},
		{"port taken", 0, []string{"service", "create", "-d", "--name", "b", "-p", "8080:80", l.Image("v1")}, []string{"8080", "web"}},
		{"worker asked for a manager's job", 1, []string{"service", "ls"}, []string{"not a swarm manager"}},
		{"wrong image name", 0, []string{"pull", l.Registry + "/nosuch:v1"}, []string{"nosuch", "not found"}},
		{"registry down", 0, []string{"pull", down + "/web:v1"}, []string{down, "connection refused"}},
		{"name taken", 0, []string{"service", "create", "-d", "--name", "web", l.Image("v1")}, []string{"web", "already exists"}},
		{"bad image reference", 0, []string{"service", "create", "-d", "--name", "c", "UPPER//x"}, []string{"UPPER"}},
		{"unknown network", 0, []string{"service", "create", "-d", "--name", "c", "--network", "nonet", l.Image("v1")}, []string{"nonet", "not found"}},
		{"join twice", 1, []string{"swarm", "join", "--token", token, l.Nodes[0].Address + ":2377"}, []string{"already part of a swarm"}},
		{"init twice", 0, []string{"swarm", "init"}, []string{"already part of a swarm"}},
		{"bad constraint", 0, []string{"service", "create", "-d", "--name", "c", "--constraint", "node.hostname=x", l.Image("v1")}, []string{"node.hostname"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			out, errOut, code := l.Docker(c.node, c.args...)
			if code == 0 {
				t.Errorf("docker %v: exit code 0, want another\n%s%s", c.args, out, errOut)
			}
			for _, w := range c.want {
				if !strings.Contains(strings.ToLower(out+errOut), strings.ToLower(w)) {
					t.Errorf("docker %v: the error does not name %q:\n%s%s", c.args, w, out, errOut)
				}
			}
		})
	}
	t.Run("wrong token", func(t *testing.T) {
		l.Must(1, "swarm", "leave")
		bad := token[:len(token)-3] + "zzz"
		_, errOut, code := l.Docker(1, "swarm", "join", "--token", bad, l.Nodes[0].Address+":2377")
		if code == 0 || !strings.Contains(errOut, "token") {
			t.Errorf("exit code %d: %s", code, errOut)
		}
		l.Must(1, "swarm", "join", "--token", token, l.Nodes[0].Address+":2377")
	})
}
