package cli_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"skein/agent/dockerapi"
	"skein/agent/dockerapi/dockerapitest"
	"skein/cmd/cli"
)

// TestMain lets the test binary be the program: docker's verbs write to the process's own streams and read its environment.
func TestMain(m *testing.M) {
	if os.Getenv("SKEIN_TEST_MAIN") == "" {
		os.Exit(m.Run())
	}
	local := &cobra.Command{Use: "local", Short: "A verb of the composition root", RunE: func(cmd *cobra.Command, _ []string) error {
		fmt.Fprintln(cmd.OutOrStdout(), "ran")
		return nil
	}}
	wait := &cobra.Command{Use: "wait-signal", Hidden: true, RunE: func(cmd *cobra.Command, _ []string) error {
		fmt.Fprintln(cmd.OutOrStdout(), "waiting")
		<-cmd.Context().Done()
		return cmd.Context().Err()
	}}
	os.Exit(cli.Main("9.8.7", local, wait))
}

type result struct {
	out  string
	code int
}

func skein(t *testing.T, env []string, args ...string) result {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, os.Args[0], args...)
	cmd.Env = append([]string{"SKEIN_TEST_MAIN=1", "HOME=" + t.TempDir()}, env...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	_ = cmd.Run()
	return result{out.String(), cmd.ProcessState.ExitCode()}
}

func serve(t *testing.T) string {
	t.Helper()
	n, c := dockerapitest.NewNode(), dockerapitest.NewCluster()
	sock := filepath.Join(t.TempDir(), "s")
	l, err := dockerapi.ListenUnix(sock, "")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	h := dockerapi.New(dockerapi.Config{Containers: n, Images: n, Networks: n, System: n, Swarm: c, Version: "t"})
	go func() { done <- dockerapi.Serve(ctx, l, h, nil) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return sock
}

func TestVerbs(t *testing.T) {
	sock := serve(t)
	env := []string{"SKEIN_HOST=unix://" + sock, "DOCKER_HOST=unix:///nonexistent"}
	for _, tc := range []struct {
		args string
		env  []string
		code int
		want string
		not  string
	}{
		{args: "", want: "First steps:", not: "Docker Desktop"},
		{args: "--help", want: "local       A verb of the composition root"},
		{args: "--version", want: "Skein version 9.8.7\n"},
		{args: "local", want: "ran\n"},
		{args: "nonsense", code: 1, want: "skein: unknown command: skein nonsense"},
		{args: "plugin ls", code: 1, want: "skein: unknown command: skein plugin"},
		{args: "service create --nonsense", code: 125, want: "Run 'skein service create --help' for more information"},
		{args: "service create --help", want: "Usage:  skein service create [OPTIONS] IMAGE [COMMAND] [ARG...]", not: "docker "},
		{args: "version", want: "Skein"},
		{args: "version --client", want: "Skein version 9.8.7 (go"},
		{args: "version --client", env: []string{"SKEIN_HOST=unix:///nonexistent"}, want: "Skein version 9.8.7 (go"},
		{args: "ps", want: "web"},
		{args: "-H unix://" + sock + " ps", env: []string{"SKEIN_HOST=unix:///nonexistent"}, want: "web"},
		{args: "ps", env: []string{"SKEIN_HOST=" + sock}, want: "web"},
		{args: "ps", env: []string{"SKEIN_HOST=", "DOCKER_HOST=unix://" + sock}, want: "web"},
		{args: "ps", env: []string{"SKEIN_HOST=", "DOCKER_HOST="}, code: 1, want: "cannot connect to the Skein daemon at unix:///run/skein/skein.sock"},
		{args: "--context default ps", env: []string{"SKEIN_HOST=", "DOCKER_HOST="}, code: 1, want: "unix:///run/skein/skein.sock", not: "/var/run/docker.sock"},
		{args: "--context nope ps", code: 1, want: "nope"},
		{args: "ps", env: []string{"DOCKER_CONTEXT=nope"}, want: "web"},
		{args: "context use x", code: 1, want: "does not follow docker's current context"},
		{args: "images", want: "busybox"},
		{args: "image ls --format json", want: `"Repository":"busybox"`},
		{args: "pull localhost:5000/a:1", want: "Pulling localhost:5000/a:1"},
		{args: "run -d --name r busybox", want: "0000000000000002"},
		{args: "logs web", want: "oops"},
		{args: "exec web missing", code: 127, want: "executable file not found"},
		{args: "stop web", want: "web"},
		{args: "info", want: "Swarm: active"},
		{args: "system df", want: "Local Volumes"},
		{args: "volume ls", want: "DRIVER"},
		{args: "stack ls", want: "NAME"},
		{args: "node ls", want: "Leader"},
		{args: "network ls", want: "ingress"},
		{args: "swarm join-token worker", want: "skein swarm join --token SWMTKN-1-worker"},
		{args: "swarm join-token -q worker", want: "SWMTKN-1-worker\n"},
		{args: "net status", want: "mesh      7         6         2s    behind"},
		{args: "net status --format json", want: `"Table":"mesh","Network":"mesh","Desired":7`},
		{args: "net check", code: 1, want: "10.0.0.5/32   missing   no"},
		{args: "net check --repair", code: 1, want: "10.0.0.5/32   missing   yes"},
		{args: "net check --format json", code: 1, want: `"Object":"10.0.0.5/32"`},
		{args: "net status", env: []string{"SKEIN_HOST=unix:///nonexistent"}, code: 1, want: "cannot connect to the Skein daemon at unix:///nonexistent"},
		{args: "service scale api=-1", code: 1, want: "-1"},
		{args: "service inspect nope", code: 1, want: "nope"},
	} {
		t.Run(tc.args, func(t *testing.T) {
			got := skein(t, append(env, tc.env...), strings.Fields(tc.args)...)
			if got.code != tc.code || !strings.Contains(got.out, tc.want) || tc.not != "" && strings.Contains(got.out, tc.not) {
				t.Errorf("%v: code %d, want %d; want %q, not %q:\n%s", tc.env, got.code, tc.code, tc.want, tc.not, got.out)
			}
		})
	}
}

// TestProgress runs the verbs that stay until the service has converged.
func TestProgress(t *testing.T) {
	env := []string{"SKEIN_HOST=unix://" + serve(t)}
	for _, args := range []string{
		"service create --update-monitor 1s --name api --replicas 3 app:1", "service scale api=5", "service update --image app:2 api", "service rollback api",
	} {
		if got := skein(t, env, strings.Fields(args)...); got.code != 0 || !strings.Contains(got.out, "converged") {
			t.Errorf("%s: %d\n%s", args, got.code, got.out)
		}
	}
	for args, want := range map[string]string{"service ls": "5/5", "service ps api": "api.5", "service logs api": "api.1."} {
		if got := skein(t, env, strings.Fields(args)...); got.code != 0 || !strings.Contains(got.out, want) {
			t.Errorf("%s: %d\n%s", args, got.code, got.out)
		}
	}
}

func TestSignal(t *testing.T) {
	cmd := exec.Command(os.Args[0], "wait-signal")
	cmd.Env = []string{"SKEIN_TEST_MAIN=1"}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 8)); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	if code := cmd.ProcessState.ExitCode(); code != 130 {
		t.Errorf("exit code %d, want 130", code)
	}
}
