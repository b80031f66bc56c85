package supervisor

import (
	"bytes"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"skein/runtime"
)

// socketPair is two ends of a connection.
func socketPair(t testing.TB) (a, b *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	end := func(fd int) *net.UnixConn {
		f := os.NewFile(uintptr(fd), "pair")
		defer f.Close()
		c, err := net.FileConn(f)
		if err != nil {
			t.Fatal(err)
		}
		return c.(*net.UnixConn)
	}
	return end(fds[0]), end(fds[1])
}

// FuzzWire: whatever comes over the socket is frames within their bound, or an error that ends the connection.
func FuzzWire(f *testing.F) {
	req, err := json.Marshal(request{Op: "create", ID: "x", Config: &runtime.Config{ID: "x"}, Process: &runtime.Process{}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(frame(frameRequest, req))
	f.Add(append(frame(frameStdin, []byte("hello")), frame(frameStdinEnd, nil)...))
	f.Add([]byte{'q', 0xff, 0xff, 0xff, 0xff, 'x'})
	f.Add([]byte{'q', 0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		in, out := socketPair(t)
		defer in.Close()
		go func() { // ends when either side is closed
			_, _ = out.Write(b)
			out.Close()
		}()
		_ = in.SetReadDeadline(time.Now().Add(10 * time.Second))
		w := newWire(in)
		total := 0
		for {
			kind, payload, fds, err := w.read()
			if err != nil {
				break
			}
			if total += headerSize + len(payload); len(payload) > maxFrame || len(fds) != 0 || total > len(b) {
				t.Fatalf("frame %c of %d bytes with %d descriptors", kind, len(payload), len(fds))
			}
			var r request
			_ = json.Unmarshal(payload, &r)
			var a response
			_ = json.Unmarshal(payload, &a)
			_ = a.err()
		}
	})
}

// FuzzJournal: a journal with anything in it opens, keeps only whole records, and can be appended to and opened again.
func FuzzJournal(f *testing.F) {
	one, err := encodeEvent(runtime.Event{Seq: 7, ContainerID: "a", Exit: runtime.Exit{Code: 3}})
	if err != nil {
		f.Fatal(err)
	}
	two, err := encodeEvent(runtime.Event{Seq: 8, ContainerID: "b", ExecID: "x"})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(append(one, two...))
	f.Add(append(append(two, one...), one[:20]...))
	f.Add(bytes.Repeat([]byte("x"), 2*maxRecord))
	f.Add([]byte("00000000 \n\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		path := filepath.Join(t.TempDir(), "journal")
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		log := slog.New(slog.NewTextHandler(io.Discard, nil))
		j, events, err := openJournal(path, log)
		if err != nil {
			t.Fatal(err)
		}
		if err := j.append(runtime.Event{ContainerID: "last"}); err != nil {
			t.Fatal(err)
		}
		j.f.Close()
		j, again, err := openJournal(path, log)
		if err != nil {
			t.Fatal(err)
		}
		defer j.f.Close()
		if len(again) != len(events)+1 || again[len(events)].ContainerID != "last" {
			t.Errorf("%d records, then %d", len(events), len(again))
		}
	})
}
