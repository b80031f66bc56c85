package logs

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

func open(t *testing.T, maxSize int64, maxFiles int) (*Writer, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "log")
	w, err := Open(path, maxSize, maxFiles)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.Close() })
	return w, path
}

func read(t *testing.T, path string, o Options) []string {
	t.Helper()
	var out []string
	err := Read(t.Context(), path, o, func(l Line) error {
		out = append(out, l.Stream[3:]+":"+string(l.Text))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestLines(t *testing.T) {
	w, path := open(t, 0, 1)
	o, e := w.Stream("stdout"), w.Stream("stderr")
	fmt.Fprint(o, "one\ntw")
	fmt.Fprint(e, "oops\n")
	fmt.Fprint(o, "o\n\nquote\"\\\t\x00\x7f\u2028 é\xff\n")
	fmt.Fprint(o, "tail")
	o.Close()
	e.Close()
	want := []string{"out:one\n", "err:oops\n", "out:two\n", "out:\n", "out:quote\"\\\t\x00\x7f\u2028 é\ufffd\n", "out:tail"}
	if got := read(t, path, Options{}); fmt.Sprintf("%q", got) != fmt.Sprintf("%q", want) {
		t.Errorf("got %q, want %q", got, want)
	}
	long := strings.Repeat("x", 40000)
	fmt.Fprint(o, long+"\n")
	var all string
	for _, l := range read(t, path, Options{})[len(want):] {
		if len(l) > maxLine+4 {
			t.Errorf("a record of %d bytes", len(l))
		}
		all += strings.TrimPrefix(l, "out:")
	}
	if all != long+"\n" {
		t.Errorf("a long line came back as %d bytes", len(all))
	}
}

// FuzzEscape: every record is valid JSON and gives the text back as far as it is valid UTF-8.
func FuzzEscape(f *testing.F) {
	f.Add([]byte("a\"\\\n\x01\xf0\x9f"))
	f.Fuzz(func(t *testing.T, b []byte) {
		rec := appendRecord(nil, b, "stdout", time.Unix(1, 2))
		var v struct{ Log, Stream, Time string }
		if err := json.Unmarshal(rec, &v); err != nil {
			t.Fatalf("%q: %v", rec, err)
		}
		want := strings.ToValidUTF8(string(b), "\ufffd")
		if utf8.Valid(b) && v.Log != want {
			t.Errorf("%q came back as %q", b, v.Log)
		}
	})
}

func TestTailSinceUntil(t *testing.T) {
	w, path := open(t, 0, 1)
	clock := time.Unix(1000, 0).UTC()
	w.now = func() time.Time { return clock }
	s := w.Stream("stdout")
	for i := range 3000 {
		fmt.Fprintf(s, "line %d\n", i)
		clock = clock.Add(time.Second)
	}
	for _, tc := range []struct {
		o     Options
		first string
		n     int
	}{
		{Options{}, "out:line 0\n", 3000},
		{Options{Tail: 1}, "out:line 2999\n", 1},
		{Options{Tail: 1000}, "out:line 2000\n", 1000},
		{Options{Tail: 5000}, "out:line 0\n", 3000},
		{Options{Since: time.Unix(1010, 0)}, "out:line 10\n", 2990},
		{Options{Until: time.Unix(1010, 0)}, "out:line 0\n", 11},
		{Options{Since: time.Unix(1010, 0), Until: time.Unix(1019, 0)}, "out:line 10\n", 10},
	} {
		got := read(t, path, tc.o)
		if len(got) != tc.n || got[0] != tc.first {
			t.Errorf("%+v: %d lines from %q, want %d from %q", tc.o, len(got), got[0], tc.n, tc.first)
		}
	}
	if err := Read(t.Context(), path+"x", Options{}, nil); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing file: %v", err)
	}
}

func TestRotation(t *testing.T) {
	w, path := open(t, 2000, 3)
	s := w.Stream("stdout")
	for i := range 100 {
		fmt.Fprintf(s, "line %d\n", i)
	}
	files, _ := filepath.Glob(path + "*")
	if len(files) != 3 {
		t.Errorf("files %v, want 3", files)
	}
	got := read(t, path, Options{})
	if got[len(got)-1] != "out:line 99\n" || len(got) < 40 || len(got) > 99 {
		t.Errorf("%d lines up to %q", len(got), got[len(got)-1])
	}
	for i := 1; i < len(got); i++ {
		var a, b int
		fmt.Sscanf(got[i-1], "out:line %d", &a)
		fmt.Sscanf(got[i], "out:line %d", &b)
		if b != a+1 {
			t.Fatalf("%q after %q", got[i], got[i-1])
		}
	}
	if tail := read(t, path, Options{Tail: 60}); len(tail) != min(60, len(got)) || tail[len(tail)-1] != got[len(got)-1] {
		t.Errorf("tail over files: %d lines of %d", len(tail), len(got))
	}
}

func TestTornLine(t *testing.T) {
	w, path := open(t, 0, 1)
	fmt.Fprint(w.Stream("stdout"), "before\n")
	w.Close()
	f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprint(f, `{"log":"half`)
	f.Close()
	again, err := Open(path, 0, 1)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	fmt.Fprint(again.Stream("stdout"), "after\n")
	if got := read(t, path, Options{}); fmt.Sprint(got) != "[out:before\n out:after\n]" {
		t.Errorf("got %q", got)
	}
}

// TestFollow reads everything once over many rotations, whatever the interleaving.
func TestFollow(t *testing.T) {
	w, path := open(t, 20000, 50)
	watcher, err := NewWatcher()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	run := make(chan error, 1)
	go func() { run <- watcher.Run(ctx) }()
	const n = 3000
	done := make(chan struct{})
	go func() {
		defer close(done)
		s := w.Stream("stdout")
		for i := range n {
			fmt.Fprintf(s, "line %d\n", i)
		}
	}()
	next := 0
	err = Read(ctx, path, Options{Follow: true, Watcher: watcher, Done: done}, func(l Line) error {
		if want := fmt.Sprintf("line %d\n", next); string(l.Text) != want {
			return fmt.Errorf("%q, want %q", l.Text, want)
		}
		next++
		return nil
	})
	if err != nil || next != n {
		t.Errorf("followed %d of %d lines: %v", next, n, err)
	}
	cancel()
	if err := <-run; err != nil {
		t.Error(err)
	}
	if len(watcher.dirs) != 0 {
		t.Error("a watch is left")
	}
}

// TestFullDisk: lines that cannot be written are counted, and writing goes on afterwards.
func TestFullDisk(t *testing.T) {
	w, err := Open("/dev/full", 0, 1)
	if err != nil {
		t.Skip(err)
	}
	defer w.Close()
	fmt.Fprint(w.Stream("stdout"), "a\nb\n")
	if n, err := w.Dropped(); n != 2 || err == nil {
		t.Errorf("dropped %d, %v; want 2 and a reason", n, err)
	}
}
