package attack

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"runtime"
	"runtime/pprof"
	"strings"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// dial opens a connection to the API.
func (n *node) dial() *net.UnixConn {
	n.t.Helper()
	c, err := net.Dial("unix", n.sock)
	must(n.t, err)
	must(n.t, c.SetDeadline(time.Now().Add(20*time.Second)))
	return c.(*net.UnixConn)
}

// TestBodiesAreUnambiguous: CVE-2024-41110, CVE-2026-34040. Whatever a request says about the length of its body, what is checked and what is carried
// out are the same bytes: a body of length zero is none, an oversized one is refused whole, and of two lengths neither is believed. (There
// are no authorisation plugins; this is what one would have to rely on.)
func TestBodiesAreUnambiguous(t *testing.T) {
	n := newNode(t)
	n.load("box", ocispec.ImageConfig{})
	evil := `{"Image":"box","HostConfig":{"NetworkMode":"host","Binds":["/:/host"]}}`
	padded := func(size int) string { return `{"Image":"box"` + strings.Repeat(" ", size) + `}` }
	chunked := func(b string) string { return fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", len(b), b) }
	const js = "Content-Type: application/json\r\n"
	for what, c := range map[string]struct {
		head, body string
		codes      []int // of all answers
	}{
		"length zero with a body":      {js + "Content-Length: 0\r\n", evil, []int{400, 400}},
		"no length with a body":        {js, evil, []int{400, 400}},
		"two lengths":                  {js + fmt.Sprintf("Content-Length: 2\r\nContent-Length: %d\r\n", len(evil)), evil, []int{400}},
		"length and chunks":            {js + "Content-Length: 2\r\nTransfer-Encoding: chunked\r\n", chunked(`{"Image":"none"}`), []int{404, 400}},
		"unknown coding":               {js + "Transfer-Encoding: gzip, chunked\r\n", chunked(evil), []int{501}},
		"negative length":              {js + "Content-Length: -1\r\n", evil, []int{400}},
		"9 MiB":                        {js + fmt.Sprintf("Content-Length: %d\r\n", len(padded(9<<20))), padded(9 << 20), []int{413}},
		"9 MiB in chunks":              {js + "Transfer-Encoding: chunked\r\n", chunked(padded(9 << 20)), []int{413}},
		"two objects":                  {js + fmt.Sprintf("Content-Length: %d\r\n", 2*len(evil)), evil + evil, []int{400}},
		"an object and more":           {js + fmt.Sprintf("Content-Length: %d\r\n", len(evil)+1), evil + "]", []int{400}},
		"shorter than its length":      {js + fmt.Sprintf("Content-Length: %d\r\n", len(evil)+10), evil, []int{400}},
		"another type":                 {"Content-Type: text/plain\r\n" + fmt.Sprintf("Content-Length: %d\r\n", len(evil)), evil, []int{400}},
		"no type":                      {fmt.Sprintf("Content-Length: %d\r\n", len(evil)), evil, []int{400}},
		"nested a hundred thousand":    {js + fmt.Sprintf("Content-Length: %d\r\n", 200_010), `{"Labels":` + strings.Repeat(`{"a":`, 20_000) + strings.Repeat(" ", 100_000), []int{400}},
		"a header of a hundred kibib.": {js + "X-A: " + strings.Repeat("a", 100<<10) + "\r\n", "", []int{431}},
	} {
		conn := n.dial()
		go func() {
			_, _ = io.WriteString(conn, "POST /containers/create?name=evil HTTP/1.1\r\nHost: d\r\n"+c.head+"\r\n"+c.body) // may be refused before its end
			_ = conn.CloseWrite()
		}()
		br := bufio.NewReader(conn)
		var codes []int
		for {
			resp, err := http.ReadResponse(br, nil)
			if err != nil {
				break
			}
			codes = append(codes, resp.StatusCode)
			if _, err := io.Copy(io.Discard, resp.Body); err != nil {
				break
			}
		}
		conn.Close()
		if len(codes) > len(c.codes) || len(codes) == 0 || codes[0] != c.codes[0] {
			t.Errorf("%s: answers %v, want %v", what, codes, c.codes)
		}
		if code, body := n.call("GET", "/containers/evil/json", nil); code != 404 {
			t.Fatalf("%s: a container was made: %s", what, body)
		}
	}
}

// descriptors counts those of a process.
func descriptors(pid int) int {
	es, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		return -1
	}
	return len(es)
}

// supervisorPid is the process that the node started.
func (n *node) supervisorPid() int {
	n.t.Helper()
	es, err := os.ReadDir("/proc")
	must(n.t, err)
	for _, e := range es {
		var pid int
		if _, err := fmt.Sscan(e.Name(), &pid); err != nil {
			continue
		}
		b, err := os.ReadFile("/proc/" + e.Name() + "/cmdline")
		if f := strings.Split(string(b), "\x00"); err == nil && len(f) > 5 && f[1] == "supervisor" && strings.HasPrefix(f[3], n.dir) {
			// The zygote has the same command line and the supervisor as its parent.
			var ppid int
			st, _ := os.ReadFile("/proc/" + e.Name() + "/stat")
			if i := strings.LastIndexByte(string(st), ')'); i > 0 {
				var state rune // sleeping or running
				_, _ = fmt.Sscanf(string(st[i+1:]), " %c %d", &state, &ppid)
			}
			if ppid == os.Getpid() {
				return pid
			}
		}
	}
	n.t.Fatal("no supervisor")
	return 0
}

// TestAttachCutOff: CVE-2025-64329. Clients attach to a container, and to its additional processes, in every combination of streams, and
// hang up at any moment: after all of them engine and supervisor have as many goroutines and descriptors as before. An attach that waits for
// output, which does not come, is never noticed to have gone in a naive implementation.
func TestAttachCutOff(t *testing.T) {
	n := newNode(t)
	n.load("box", ocispec.ImageConfig{})
	n.must("POST", "/containers/create?name=box", map[string]any{"Image": "box", "Cmd": []string{"sleep"}, "OpenStdin": true, "HostConfig": map[string]any{"NetworkMode": "host"}})
	n.must("POST", "/containers/box/start", nil)
	n.call("GET", "/_ping", nil)
	sup := n.supervisorPid()
	settle := func() (int, int, int) {
		n.http.CloseIdleConnections()
		runtime.GC()
		return runtime.NumGoroutine(), descriptors(os.Getpid()), descriptors(sup)
	}
	time.Sleep(50 * time.Millisecond) // whatever start left to end
	goroutines, ours, theirs := settle()
	queries := []string{"stream=1&stdout=1", "stream=1&stdout=1&stderr=1", "stream=1&stdin=1&stdout=1&stderr=1", "stream=1&stdin=1", "stream=1&logs=1&stdout=1"}
	total := manyRounds(150)
	for i := range total {
		conn := n.dial()
		fmt.Fprintf(conn, "POST /containers/box/attach?%s HTTP/1.1\r\nHost: d\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n", queries[i%len(queries)])
		switch i % 4 {
		case 0: // at once
		case 1, 2: // attached
			if _, err := http.ReadResponse(bufio.NewReader(conn), nil); err != nil {
				t.Fatal(err)
			}
		case 3: // after half a close
			_ = conn.CloseWrite()
		}
		conn.Close()
	}
	var g, o, s int
	for until := time.Now().Add(30 * time.Second); ; {
		g, o, s = settle()
		if g <= goroutines+3 && o <= ours+3 && s <= theirs+3 {
			break
		}
		if time.Now().After(until) {
			t.Error("what the attaches took is not given back")
			_ = pprof.Lookup("goroutine").WriteTo(os.Stderr, 1)
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Logf("%d attaches: goroutines %d → %d, descriptors of the engine %d → %d, of the supervisor %d → %d", total, goroutines, g, ours, o, theirs, s)
}

// TestEndlessOutput: CVE-2022-31030. A process prints far more than anybody reads: to a client that has stopped reading, in one line without an end,
// and into the log. Engine and supervisor hold a few buffers, and the output arrives whole when it is read.
func TestEndlessOutput(t *testing.T) {
	n := newNode(t)
	n.load("box", ocispec.ImageConfig{})
	n.run("box", "box", map[string]any{"LogConfig": map[string]any{"Type": "json-file", "Config": map[string]string{"max-size": "4m", "max-file": "2"}}}, "sleep")
	mib := amount(100, 10<<10)
	for _, args := range [][]string{{"flood", fmt.Sprint(mib)}, {"line", fmt.Sprint(mib)}} {
		var out struct{ ID string }
		body := n.must("POST", "/containers/box/exec", map[string]any{"Cmd": append([]string{"/inside"}, args...), "AttachStdout": true, "AttachStderr": true})
		must(t, json.Unmarshal([]byte(body), &out))
		sup := fmt.Sprintf("/proc/%d/status", n.supervisorPid())
		mem, before := heap(), anon(sup)
		conn := n.dial()
		must(t, conn.SetDeadline(time.Now().Add(10*time.Minute)))
		req := `{"Detach":false}`
		fmt.Fprintf(conn, "POST /exec/%s/start HTTP/1.1\r\nHost: d\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n%s", out.ID, len(req), req)
		br := bufio.NewReader(conn)
		if _, err := http.ReadResponse(br, nil); err != nil {
			t.Fatal(err)
		}
		time.Sleep(300 * time.Millisecond) // nobody reads: the process has to wait
		got, err := io.Copy(io.Discard, br)
		conn.Close()
		if err != nil || got < int64(mib)<<20 {
			t.Errorf("%v: got %d MiB of %d: %v", args, got>>20, mib, err)
		}
		if grown := mem(); grown > 64<<20 {
			t.Errorf("%v: the engine took %d MiB", args, grown>>20)
		}
		if grown := anon(sup) - before; grown > 32<<20 {
			t.Errorf("%v: the supervisor took %d MiB", args, grown>>20)
		}
	}
	// The same as the container's own output, and read back from its log.
	n.run("line", "box", map[string]any{"LogConfig": map[string]any{"Type": "json-file", "Config": map[string]string{"max-size": "64m", "max-file": "1"}}}, "line", "20")
	n.waitEnd("line")
	mem := heap()
	for _, q := range []string{"stdout=1", "stdout=1&tail=1", "stdout=1&timestamps=1&tail=100"} {
		resp, err := n.http.Get("http://d/containers/line/logs?" + q)
		must(t, err)
		_, err = io.Copy(io.Discard, resp.Body)
		must(t, err)
		resp.Body.Close()
	}
	if grown := mem(); grown > 64<<20 {
		t.Errorf("logs: the engine took %d MiB", grown>>20)
	}
}
