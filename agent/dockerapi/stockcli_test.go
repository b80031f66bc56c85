package dockerapi_test

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

const stockCLI = "/usr/local/bin/docker"

// TestStockCLI runs docker's own client against the API.
func TestStockCLI(t *testing.T) {
	if _, err := os.Stat(stockCLI); err != nil {
		t.Skipf("no docker client: %v", err)
	}
	_, c, h := newHandler()
	sock := serve(t, h)
	home := t.TempDir()
	run := func(t *testing.T, stdin string, args ...string) (string, error) {
		t.Helper()
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		cmd := exec.CommandContext(ctx, stockCLI, args...)
		cmd.Env = []string{"HOME=" + home, "DOCKER_HOST=unix://" + sock, "PATH=/nonexistent"}
		cmd.Stdin = strings.NewReader(stdin)
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &out
		err := cmd.Run()
		return out.String(), err
	}
	for _, tc := range []struct {
		args  string
		stdin string
		want  []string
		fails bool
	}{
		{args: "version", want: []string{"Server: Skein", "1.55 (minimum version 1.40)", "linux/amd64"}},
		{args: "info", want: []string{"Swarm: active", "Is Manager: true", "Nodes: 1", "Managers: 1"}},
		{args: "ps", want: []string{"web", "busybox"}},
		{args: "ps -a --filter nonsense=1", want: []string{"invalid filter 'nonsense'"}, fails: true},
		{args: "images", want: []string{"busybox"}},
		{args: "pull -q localhost:5000/app:1", want: []string{"localhost:5000/app:1"}},
		{args: "logs web", want: []string{"hello", "oops"}},
		{args: "attach web", stdin: "typed\n", want: []string{"typed", "bye"}},
		{args: "start web", want: []string{"web"}},
		{args: "exec -i web cat", stdin: "sent\n", want: []string{"cat\nsent\n"}},
		{args: "exec web missing", want: []string{"executable file not found"}, fails: true},
		{args: "inspect missing", want: []string{"No such object: missing"}, fails: true},
		{args: "start web", want: []string{"web"}},
		{args: "stop web", want: []string{"web"}},
		{args: "run -d --name r --restart always -p 80 -e A=b busybox sleep 1", want: []string{"0000000000000002"}},
		{args: "rename r s", want: []string{""}},
		{args: "top s", want: []string{"sleep"}},
		{args: "wait web", want: []string{"0"}},
		{args: "rm -f s", want: []string{"s"}},
		{args: "events --since 1 --until 2", want: []string{"container die past"}},
		{args: "load -i /dev/null", want: []string{"Loaded 0 bytes"}},
		{args: "save busybox", want: []string{"busybox"}},
		{args: "container prune -f", want: []string{"Total reclaimed space: 0B"}},
		{args: "rmi busybox", want: []string{"Untagged: busybox"}},
		{args: "network ls", want: []string{"ingress", "overlay", "swarm", "bridge"}},
		{args: "network create -d overlay back", want: []string{""}},
		{args: "network inspect back", want: []string{`"Scope": "swarm"`}},
		{args: "network rm back", want: []string{"back"}},
		{args: "network create -d overlay gone", want: []string{""}},
		{args: "network prune -f", want: []string{"Deleted Networks:\ngone"}},
		{args: "system df", want: []string{"Images          1", "Containers", "Local Volumes   0", "Build Cache     0"}},
		{args: "system df -v", want: []string{"busybox", "web", "CACHE ID"}},
		{args: "system prune -af", want: []string{"Total reclaimed space: 0B"}},
		{args: "volume ls", want: []string{"DRIVER"}},
		{args: "volume create v", want: []string{"the volumes part of the API is not built yet"}, fails: true},
		{args: "node ls", want: []string{"n1", "Ready", "Leader"}},
		{args: "node inspect self --pretty", want: []string{"Hostname:"}},
		{args: "swarm join-token worker", want: []string{"--token SWMTKN-1-worker"}},
		{args: "swarm update --autolock=true", want: []string{"Swarm updated.", "SWMKEY-1-test"}},
		{args: "secret ls", want: []string{"NAME"}},
		{args: "service create -d -q --name api --replicas 3 --with-registry-auth localhost:5000/app:1", want: []string{""}},
		{args: "service ps api", want: []string{"api.1"}},
		{args: "service ps api", want: []string{"api.1"}},
		{args: "service ps api", want: []string{"api.1"}},
		{args: "service ps api", want: []string{"api.1"}},
		{args: "service ls", want: []string{"api", "3/3", "localhost:5000/app:1"}},
		{args: "service ps api", want: []string{"api.1", "api.3", "Running"}},
		{args: "service scale --detach api=2", want: []string{"api scaled to 2"}},
		{args: "service update -d --image localhost:5000/app:2 api", want: []string{"api"}},
		{args: "service rollback -d api", want: []string{"api"}},
		{args: "service logs --raw api", want: []string{"out of "}},
		{args: "service logs api", want: []string{"api.1.", "@n1    | out of"}},
		{args: "service inspect --pretty api", want: []string{"Name:\t\tapi"}},
		{args: "service rm api", want: []string{"api"}},
		{args: "service inspect api", want: []string{"no such service: api"}, fails: true},
		{args: "service create -d -q --name onhost --network host --replicas 1 app:1", want: []string{""}},
		{args: "service rm onhost", want: []string{"onhost"}},
		{args: "swarm leave --force", want: []string{"Node left the swarm."}},
		{args: "node ls", want: []string{`This node is not a swarm manager. Use "docker swarm init"`}, fails: true},
	} {
		t.Run(tc.args, func(t *testing.T) {
			out, err := run(t, tc.stdin, strings.Fields(tc.args)...)
			if (err != nil) != tc.fails {
				t.Fatalf("%v\n%s", err, out)
			}
			for _, want := range tc.want {
				if !strings.Contains(out, want) {
					t.Errorf("%q is missing in\n%s", want, out)
				}
			}
		})
	}
	if n := len(c.Created); n != 2 || !strings.Contains(string(c.Created[1].SpecJson), `"Networks":[{"Target":"host"}]`) || !strings.HasPrefix(string(c.Created[0].SpecJson), `{"Name":"api"`) {
		t.Errorf("%d services created", n)
	} else if img := string(c.Created[0].SpecJson); !strings.Contains(img, "localhost:5000/app:1@sha256:") {
		t.Errorf("the client did not pin the image: %s", img)
	}
}

// TestStockCLIProgress creates, scales and updates a service in the foreground until docker's client says that it converged.
func TestStockCLIProgress(t *testing.T) {
	if _, err := os.Stat(stockCLI); err != nil {
		t.Skipf("no docker client: %v", err)
	}
	_, _, h := newHandler()
	sock := serve(t, h)
	for _, args := range []string{
		"service create --update-monitor 1s --name api --replicas 3 app:1", "service scale api=5", "service update --image app:2 api", "service rollback api",
	} {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		cmd := exec.CommandContext(ctx, stockCLI, strings.Fields(args)...)
		cmd.Env = []string{"HOME=" + t.TempDir(), "DOCKER_HOST=unix://" + sock}
		start := time.Now()
		out, err := cmd.CombinedOutput()
		cancel()
		if err != nil || !strings.Contains(string(out), "converged") {
			t.Errorf("%s: %v\n%s", args, err, out)
		}
		t.Logf("%s: %v\n%s", args, time.Since(start).Round(time.Millisecond), out)
	}
}
