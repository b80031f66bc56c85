package supervisor

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"net"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"skein/runtime"
)

var attaches = flag.Int("attaches", 500, "attached clients that leave without a word")

// use is what a supervisor has open, runs, and has in memory of its own (KiB).
type use struct{ fds, routines, private int }

func (e *env) use() use {
	e.t.Helper()
	c, err := dial(e.ctx, e.cfg.SocketPath)
	e.must(err)
	defer c.Close()
	resp, err := c.once(e.ctx, &request{Op: "hello"})
	e.must(err)
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", resp.PID))
	e.must(err)
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", resp.PID))
	e.must(err)
	u := use{fds: len(fds), routines: resp.Routines}
	for l := range bytes.Lines(status) {
		if rest, ok := bytes.CutPrefix(l, []byte("RssAnon:")); ok {
			u.private, err = strconv.Atoi(string(bytes.Fields(rest)[0]))
			e.must(err)
		}
	}
	return u
}

// cutOff attaches as a client that leaves at some point: while it asks, before the answer, after it, or with output on its way.
func (e *env) cutOff(id string, i int) {
	e.t.Helper()
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: e.cfg.SocketPath, Net: "unix"})
	e.must(err)
	defer conn.Close()
	w := newWire(conn)
	if i%4 == 0 {
		_, err := conn.Write(frame(frameRequest, []byte(`{"op":"attach"`))[:9+i%7])
		e.must(err)
		return
	}
	_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
	e.must(w.writeJSON(frameRequest, &request{Op: "attach", ID: id, Stdin: true, Stdout: true, Stderr: true}))
	for range i%4 - 1 {
		if _, _, _, err := w.read(); err != nil {
			e.t.Errorf("attach %d: %v", i, err)
		}
	}
	_, _ = conn.Write(frame(frameStdin, []byte("half a frame"))[:i%17])
}

// TestAttachesCutOff: clients that attach and vanish, or never read, leave nothing behind.
func TestAttachesCutOff(t *testing.T) {
	e := newEnv(t)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	e.ctx = ctx
	c := e.config("box", "busy")
	c.OpenStdin, c.LogPath = true, ""
	e.start(c)
	for i := range 50 {
		e.cutOff("box", i)
	}
	var before use
	e.until(func() bool { // the first ones are gone
		last := before
		before = e.use()
		return before.fds == last.fds && before.routines == last.routines
	})
	for i := range *attaches {
		e.cutOff("box", i)
	}
	var after use
	e.until(func() bool {
		after = e.use()
		return after.fds <= before.fds+2 && after.routines <= before.routines+4
	})
	t.Logf("before %+v, after %d attaches %+v", before, *attaches, after)
	if after.private > before.private+8<<10 {
		t.Errorf("memory grew from %d to %d KiB", before.private, after.private)
	}
}

// TestUnreadOutput: a process that prints without end while its clients do not read, or there are none, costs a bounded amount.
func TestUnreadOutput(t *testing.T) {
	e := newEnv(t)
	box := e.config("box", "sleep")
	e.start(box)
	before := e.use()
	for i := range 8 {
		_, err := e.sup.Exec(e.ctx, "box", runtime.Process{ID: fmt.Sprint("x", i), Args: []string{"/inside", "pour"}})
		e.must(err)
	}
	for i := range 4 { // the others have no client
		conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: e.cfg.SocketPath, Net: "unix"})
		e.must(err)
		defer conn.Close()
		w := newWire(conn)
		e.must(w.writeJSON(frameRequest, &request{Op: "attach", ID: "box", ExecID: fmt.Sprint("x", i), Stdout: true}))
		_, _, _, err = w.read()
		e.must(err)
	}
	time.Sleep(500 * time.Millisecond) // they pour
	after := e.use()
	t.Logf("before %+v, with 8 that pour %+v", before, after)
	if limit := before.private + 8*2*queuedChunks*maxChunk>>10; after.private > limit {
		t.Errorf("memory grew from %d to %d KiB", before.private, after.private)
	}
	begun := time.Now()
	e.must(e.sup.Signal(e.ctx, "box", 9))
	if x := e.wait("box"); x.Code != 137 {
		t.Errorf("%+v", x)
	}
	if d := time.Since(begun); d > stallLimit-10*time.Second {
		t.Errorf("clients that do not read held up the end for %v", d)
	}
	e.must(e.sup.Delete(e.ctx, "box"))
}

// TestTooManyAttached: attached clients that stay cannot keep calls out.
func TestTooManyAttached(t *testing.T) {
	e := newEnv(t)
	e.start(e.config("box", "sleep"))
	refused := error(nil)
	for range maxSessions + 10 {
		conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: e.cfg.SocketPath, Net: "unix"})
		e.must(err)
		defer conn.Close()
		w := newWire(conn)
		e.must(w.writeJSON(frameRequest, &request{Op: "attach", ID: "box", Stdout: true}))
		if _, _, err := (&client{}).readResponse(e.ctx, w, "attach"); err != nil {
			refused = err
		}
	}
	if !errdefs.IsResourceExhausted(refused) {
		t.Errorf("attached without end: %v", refused)
	}
	e.must(e.sup.Signal(e.ctx, "box", 9))
	e.wait("box")
}
