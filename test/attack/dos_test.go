package attack

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// answersSoon bounds how long a ping may take while a container does its worst. In the short mode the machine may be busy with other tests.
func answersSoon() time.Duration {
	if *long {
		return time.Second
	}
	return 5 * time.Second
}

// amount is how much of something a flood makes.
func amount(short, full int) int {
	if *long {
		return full
	}
	return short
}

// TestFloods: a fork bomb, open files, processes that nobody waits for, output without an end into a log with a limit, files without number,
// and mounts without number, each without any option that limits it: the API answers meanwhile, the container is removed afterwards, and what
// has a bound kept it. Without a default limit of processes, the bomb takes all of the node's.
func TestFloods(t *testing.T) {
	n := newNode(t)
	n.load("box", ocispec.ImageConfig{})
	for _, f := range []struct {
		name string
		host map[string]any
		args []string
		wait string // in the output, before the flood is looked at
		look func(t *testing.T, n *node, name string)
	}{
		{"forks", nil, []string{"forkbomb"}, "", bombed},
		{"zombies", nil, []string{"zombies", strconv.Itoa(amount(500, 10_000))}, "zombies ", nil},
		{"files", nil, []string{"openfiles"}, "files ", nil},
		{"inodes", nil, []string{"inodes", strconv.Itoa(amount(2_000, 60_000))}, "inodes done", nil},
		{"log", map[string]any{"LogConfig": map[string]any{"Type": "json-file", "Config": map[string]string{"max-size": "1m", "max-file": "3"}}},
			[]string{"flood", strconv.Itoa(amount(30, 2000)), "sleep"}, "", rotated},
		{"mounts", nil, []string{"mount", "sleep"}, "mount operation not permitted", nil},
	} {
		t.Run(f.name, func(t *testing.T) {
			stop := n.pings()
			n.run(f.name, "box", f.host, f.args...)
			if f.wait != "" {
				eventually(t, f.name+": "+f.wait, func() bool { return strings.Contains(n.tail(f.name), f.wait) })
			}
			if f.look != nil {
				f.look(t, n, f.name)
			}
			begun := time.Now()
			n.must("DELETE", "/containers/"+f.name+"?force=1", nil)
			removed := time.Since(begun)
			if d := stop(); d > answersSoon() {
				t.Errorf("a ping took %v", d)
			} else {
				t.Logf("longest ping %v, removed in %v", d.Round(time.Millisecond), removed.Round(time.Millisecond))
			}
		})
	}
}

// tail is the end of the container's output.
func (n *node) tail(name string) string {
	n.t.Helper()
	return n.must("GET", "/containers/"+name+"/logs?stdout=1&stderr=1&tail=20", nil)
}

// bombed waits until the bomb has met its limit, which is a share of the node's processes.
func bombed(t *testing.T, n *node, name string) {
	t.Helper()
	limit, max := 0, n.pids(name, "pids.max")
	if limit, _ = strconv.Atoi(max); limit == 0 {
		t.Fatalf("the container may have %q processes", max)
	}
	b, err := os.ReadFile("/proc/sys/kernel/pid_max")
	must(t, err)
	if all, _ := strconv.Atoi(strings.TrimSpace(string(b))); limit > all/4 && limit > 1024 {
		t.Errorf("one container may have %d of the node's %d processes", limit, all)
	}
	if !*long {
		limit = 300 // to take part in the tests of a busy machine
		n.must("POST", "/containers/"+name+"/update", map[string]any{"PidsLimit": limit})
	}
	eventually(t, "the bomb", func() bool {
		now, _ := strconv.Atoi(n.pids(name, "pids.current"))
		return now >= limit*9/10
	})
	if code, text := n.call("POST", "/containers/"+name+"/exec", map[string]any{"Cmd": []string{"/inside", "exit", "0"}}); code >= 500 {
		t.Errorf("exec beside the bomb: %d %s", code, text)
	}
	n.must("GET", "/containers/"+name+"/top", nil)
}

// pids reads a file of the container's group of the pids controller.
func (n *node) pids(name, file string) string {
	n.t.Helper()
	var c struct{ ID string }
	must(n.t, json.Unmarshal([]byte(n.must("GET", "/containers/"+name+"/json", nil)), &c))
	for _, root := range []string{"/sys/fs/cgroup/pids", "/sys/fs/cgroup"} {
		if b, err := os.ReadFile(filepath.Join(root, n.group, c.ID, file)); err == nil {
			return strings.TrimSpace(string(b))
		}
	}
	n.t.Skip("no pids controller")
	return ""
}

// rotated checks that a log stays within its size and number of files while it is written to.
func rotated(t *testing.T, n *node, name string) {
	t.Helper()
	in := n.inspect(name)
	dir := filepath.Dir(in["LogPath"].(string))
	eventually(t, "a second log file", func() bool {
		es, err := filepath.Glob(filepath.Join(dir, "*-json.log*"))
		return err == nil && len(es) > 1
	})
	until := time.Now().Add(time.Duration(amount(500, 20_000)) * time.Millisecond)
	for time.Now().Before(until) {
		var sum int64
		es, err := filepath.Glob(filepath.Join(dir, "*-json.log*"))
		must(t, err)
		for _, e := range es {
			if st, err := os.Stat(e); err == nil {
				sum += st.Size()
			}
		}
		if sum > 5<<20 || len(es) > 4 { // one may be about to go
			t.Fatalf("a log of 3 files of 1 MiB has %d files, %d bytes", len(es), sum)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// TestHugeRequests: what a container is to have without number is refused or carried out, in bounded time and memory.
func TestHugeRequests(t *testing.T) {
	n := newNode(t)
	n.load("box", ocispec.ImageConfig{})
	many := func(k int, f string) []string {
		out := make([]string, k)
		for i := range out {
			out[i] = fmt.Sprintf(f, i)
		}
		return out
	}
	tmpfs := map[string]string{}
	for _, d := range many(20_000, "/t%d") {
		tmpfs[d] = ""
	}
	sysctls := map[string]string{}
	for _, k := range many(20_000, "net.x%d") {
		sysctls[k] = "1"
	}
	stop, mem := n.pings(), heap()
	for name, req := range map[string]map[string]any{
		"tmpfs":   {"HostConfig": map[string]any{"Tmpfs": tmpfs}},
		"binds":   {"HostConfig": map[string]any{"Binds": many(20_000, "/tmp:/b%d")}},
		"sysctls": {"HostConfig": map[string]any{"Sysctls": sysctls}},
		"env":     {"Env": many(100_000, "E%d=x")},
		"args":    {"Cmd": many(100_000, "a%d")},
		"groups":  {"HostConfig": map[string]any{"GroupAdd": many(100_000, "%d")}},
		"masks":   {"HostConfig": map[string]any{"MaskedPaths": many(50_000, "/proc/%d")}},
		"deep":    {"WorkingDir": "/" + strings.Repeat("a/", 1<<20)},
		"labels":  {"Labels": tmpfs},
	} {
		req["Image"] = "box"
		if req["HostConfig"] == nil {
			req["HostConfig"] = map[string]any{}
		}
		req["HostConfig"].(map[string]any)["NetworkMode"] = "host"
		begun := time.Now()
		code, text := n.call("POST", "/containers/create?name=huge-"+name, req)
		if code < 400 {
			code, text = n.call("POST", "/containers/huge-"+name+"/start", nil)
			n.must("DELETE", "/containers/huge-"+name+"?force=1", nil)
		}
		if d := time.Since(begun); d > 10*time.Second || code == 500 && strings.Contains(text, "panic") || code < 400 && name != "labels" {
			t.Errorf("%s: %d after %v: %.200s", name, code, d, text)
		}
	}
	if d := stop(); d > answersSoon() {
		t.Errorf("a ping took %v", d)
	}
	if grown := mem(); grown > 256<<20 {
		t.Errorf("the daemon took %d MiB", grown>>20)
	}
}

// TestManyListeners: clients that follow events and logs and read nothing are cut off or wait; they take no memory that grows, and nobody waits for
// them.
func TestManyListeners(t *testing.T) {
	n := newNode(t)
	n.load("box", ocispec.ImageConfig{})
	n.run("noisy", "box", nil, "sleep")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	for range amount(20, 500) {
		for _, p := range []string{"/events", "/containers/noisy/logs?stdout=1&follow=1"} {
			req, err := http.NewRequestWithContext(ctx, "GET", "http://d"+p, nil)
			must(t, err)
			go func() {
				resp, err := n.http.Do(req)
				if err != nil {
					return
				}
				defer resp.Body.Close()
				<-ctx.Done() // reads nothing
			}()
		}
	}
	mem := heap()
	n.startExec(n.exec("noisy", "/inside", "flood", "5"))
	for i := range amount(200, 3000) {
		n.must("POST", "/containers/noisy/rename?name=n"+strconv.Itoa(i%2), nil)
		n.must("POST", "/containers/n"+strconv.Itoa(i%2)+"/rename?name=noisy", nil)
	}
	if grown := mem(); grown > 128<<20 {
		t.Errorf("the daemon took %d MiB", grown>>20)
	}
	cancel()
	resp, err := n.http.Get("http://d/_ping")
	must(t, err)
	_, _ = io.Copy(io.Discard, resp.Body)
	resp.Body.Close()
}
