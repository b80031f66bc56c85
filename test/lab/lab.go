// Package lab runs real clusters for tests: network namespaces as hosts, the real binary as daemons, a registry with the tests' web app.
package lab

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	_ "skein/cmd/daemon" // built and run, not called: named here so that cached results of old daemons are not taken for today's
	"skein/cmd/dev"
	"skein/runtime/image"
	"skein/runtime/image/registry"
)

// Lab is a cluster and a registry. It is removed with the test, which fails if anything is left.
type Lab struct {
	*dev.Cluster
	t        testing.TB
	Registry string // host:port as nodes reach it
	Binary   string
}

// NeedRoot skips tests that cannot run here.
func NeedRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces, mounts and cgroups")
	}
	if testing.Short() {
		t.Skip("-short: real clusters are left out")
	}
}

var built atomic.Bool // whether build ran

// build compiles the programs once per test binary.
var build = sync.OnceValues(func() (dir string, err error) {
	built.Store(true)
	dir, err = os.MkdirTemp("", "skein-lab-")
	if err != nil {
		return "", err
	}
	for out, args := range map[string][]string{
		"skein":     {"skein/cmd/skein"},
		"webapp-v1": {"-ldflags", "-s -w -X main.version=v1", "skein/cmd/demo/webapp"},
		"webapp-v2": {"-ldflags", "-s -w -X main.version=v2", "skein/cmd/demo/webapp"},
	} {
		cmd := exec.Command("go", append([]string{"build", "-o", filepath.Join(dir, out)}, args...)...)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if msg, err := cmd.CombinedOutput(); err != nil {
			return "", fmt.Errorf("build %s: %w: %s", out, err, msg)
		}
	}
	return dir, nil
})

// Main runs the tests and removes what build made.
func Main(m *testing.M) int {
	code := m.Run()
	if built.Load() {
		dir, _ := build()
		_ = os.RemoveAll(dir)
	}
	return code
}

// New starts a cluster.
func New(t testing.TB, name string, managers, workers int) *Lab {
	t.Helper()
	NeedRoot(t)
	dir, err := build()
	if err != nil {
		t.Fatal(err)
	}
	if err := dev.Down(name); err != nil { // of a run that was killed
		t.Fatal(err)
	}
	l := &Lab{t: t, Binary: filepath.Join(dir, "skein")}
	t.Cleanup(func() {
		if t.Failed() {
			l.dumpLogs()
		}
		if err := dev.Down(name); err != nil {
			t.Errorf("take the cluster down: %v", err)
		}
		for _, x := range dev.Leftovers(name) {
			t.Errorf("left behind: %s", x)
		}
	})
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if l.Cluster, err = dev.Up(ctx, dev.Options{Name: name, Managers: managers, Workers: workers, Binary: l.Binary}); err != nil {
		t.Fatal(err)
	}
	l.serve(dir)
	return l
}

func (l *Lab) serve(dir string) {
	l.t.Helper()
	reg, err := registry.New(registry.Config{})
	if err != nil {
		l.t.Fatal(err)
	}
	for _, v := range []string{"v1", "v2"} {
		bin, err := os.ReadFile(filepath.Join(dir, "webapp-"+v))
		if err != nil {
			l.t.Fatal(err)
		}
		art, err := image.FromBinary("/webapp", bin, ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH}, ocispec.ImageConfig{})
		if err == nil {
			_, err = reg.Put("web:"+v, art.MediaType, art.Manifest, art.Blobs()...)
		}
		if err != nil {
			l.t.Fatal(err)
		}
	}
	ln, err := net.Listen("tcp", net.JoinHostPort(l.HostAddr().String(), "0"))
	if err != nil {
		l.t.Fatal(err)
	}
	srv := &http.Server{Handler: reg, ReadHeaderTimeout: 10 * time.Second}
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.Serve(ln) }()
	l.t.Cleanup(func() { srv.Close(); <-done })
	l.Registry = ln.Addr().String()
}

// Image is the tests' web app, version v1 or v2.
func (l *Lab) Image(version string) string { return l.Registry + "/web:" + version }

func (l *Lab) dumpLogs() {
	if l.Cluster == nil {
		return
	}
	for _, n := range l.Nodes {
		b, err := os.ReadFile(filepath.Join(filepath.Dir(n.StateDir), "daemon.log"))
		if err != nil {
			continue
		}
		lines := strings.Split(string(b), "\n")
		l.t.Logf("--- log of %s (end)\n%s", n.Name, strings.Join(lines[max(0, len(lines)-25):], "\n"))
	}
}

// Docker runs the stock docker command line against a node; the test is skipped where there is none.
func (l *Lab) Docker(node int, args ...string) (stdout, stderr string, code int) {
	l.t.Helper()
	path, err := exec.LookPath("docker")
	if err != nil {
		l.t.Skip("no docker command line on this machine")
	}
	return l.run(path, append([]string{"-H", "unix://" + l.Nodes[node].Socket}, args...)...)
}

// cliWait bounds one command.
const cliWait = 90 * time.Second

func (l *Lab) run(name string, args ...string) (stdout, stderr string, code int) {
	ctx, cancel := context.WithTimeout(context.Background(), cliWait)
	defer cancel()
	var o, e strings.Builder
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdout, cmd.Stderr = &o, &e
	cmd.Env = append(os.Environ(), "DOCKER_CLI_HINTS=false")
	err := cmd.Run()
	if ctx.Err() != nil {
		l.t.Fatalf("%s %v did not end within %v\n%s%s", name, args, cliWait, o.String(), e.String())
	}
	if err != nil && cmd.ProcessState == nil {
		l.t.Fatal(err)
	}
	return o.String(), e.String(), cmd.ProcessState.ExitCode()
}

// Must runs the stock docker command line and fails the test unless it succeeds.
func (l *Lab) Must(node int, args ...string) string {
	l.t.Helper()
	o, e, code := l.Docker(node, args...)
	if code != 0 {
		l.t.Fatalf("docker %v on %s: exit code %d\n%s%s", args, l.Nodes[node].Name, code, o, e)
	}
	return strings.TrimSpace(o)
}

// Get asks a URL once over a new connection.
func Get(url string, timeout time.Duration) (string, error) {
	c := &http.Client{Timeout: timeout, Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := c.Get(url)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", resp.Status, b)
	}
	return string(b), err
}

// Eventually polls until ok returns true, and fails the test with the last explanation when that takes longer than limit. It returns
// how long it took.
func (l *Lab) Eventually(limit time.Duration, what string, ok func() (bool, string)) time.Duration {
	l.t.Helper()
	begun := time.Now()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		done, why := ok()
		if done {
			return time.Since(begun)
		}
		if time.Since(begun) > limit {
			l.t.Fatalf("%s: not within %v: %s", what, limit, why)
		}
		<-tick.C
	}
}
