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

func open(t *testing.T, cfg Config) (*Writer, string) {
	t.Helper()
	if cfg.Path == "" {
		cfg.Path = filepath.Join(t.TempDir(), "log")
	}
	w, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.Close() })
	return w, cfg.Path
}

// formats runs a test for both formats, plain and compressed.
func formats(t *testing.T, run func(t *testing.T, cfg Config)) {
	for _, f := range []string{JSON, Local} {
		for _, z := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s compress=%v", f, z), func(t *testing.T) { run(t, Config{Format: f, Compress: z}) })
		}
	}
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

func TestLines(t *testing.T) { formats(t, testLines) }

func testLines(t *testing.T, cfg Config) {
	w, path := open(t, cfg)
	o, e := w.Stream("stdout", nil), w.Stream("stderr", nil)
	fmt.Fprint(o, "one\ntw")
	fmt.Fprint(e, "oops\n")
	fmt.Fprint(o, "o\n\nquote\"\\\t\x00\x7f\u2028 é\xff\n")
	fmt.Fprint(o, "tail")
	o.Close()
	e.Close()
	want := []string{"out:one\n", "err:oops\n", "out:two\n", "out:\n", "out:quote\"\\\t\x00\x7f\u2028 é\ufffd\n", "out:tail"}
	if cfg.Format == Local { // keeps what is not UTF-8
		want[4] = "out:quote\"\\\t\x00\x7f\u2028 é\xff\n"
	}
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
		rec := jsonFormat{}.appendRecord(nil, b, "stdout", time.Unix(1, 2))
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

func TestTailSinceUntil(t *testing.T) { formats(t, testTailSinceUntil) }

func testTailSinceUntil(t *testing.T, cfg Config) {
	cfg.MaxSize, cfg.MaxFiles = 30000, 100
	w, path := open(t, cfg)
	clock := time.Unix(1000, 0).UTC()
	w.now = func() time.Time { return clock }
	s := w.Stream("stdout", nil)
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

func TestRotation(t *testing.T) { formats(t, testRotation) }

func testRotation(t *testing.T, cfg Config) {
	cfg.MaxSize, cfg.MaxFiles = 2000, 3
	if cfg.Format == Local {
		cfg.MaxSize = 700
	}
	w, path := open(t, cfg)
	s := w.Stream("stdout", nil)
	for i := range 100 {
		fmt.Fprintf(s, "line %d\n", i)
	}
	if err := w.Close(); err != nil {
		t.Error(err)
	}
	files, _ := filepath.Glob(path + "*")
	if len(files) != 3 || strings.HasSuffix(files[1], ".gz") != cfg.Compress || strings.HasSuffix(files[2], ".gz") != cfg.Compress {
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

// TestTornLine: whatever part of the last record a crash left, what was before and what comes after is read.
func TestTornLine(t *testing.T) {
	for _, f := range []string{JSON, Local} {
		whole, err := formatOf(f)
		if err != nil {
			t.Fatal(err)
		}
		rec := whole.appendRecord(nil, []byte("half\n"), "stdout", time.Unix(1, 0))
		if f == JSON {
			rec = rec[:len(rec)-1] // without its line feed it is a record all the same
		}
		for cut := range len(rec) {
			w, path := open(t, Config{Format: f})
			fmt.Fprint(w.Stream("stdout", nil), "before\n")
			w.Close()
			file, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			file.Write(rec[:cut])
			file.Close()
			if got := read(t, path, Options{Tail: 1}); f == Local && fmt.Sprint(got) != "[out:before\n]" {
				t.Errorf("%s, torn at %d: tail %q", f, cut, got)
			}
			again, _ := open(t, Config{Path: path, Format: f})
			fmt.Fprint(again.Stream("stdout", nil), "after\n")
			for _, o := range []Options{{}, {Tail: 2}} {
				if f == JSON && o.Tail > 0 {
					continue // a torn line counts
				}
				if got := read(t, path, o); fmt.Sprint(got) != "[out:before\n out:after\n]" {
					t.Errorf("%s, torn at %d: %q", f, cut, got)
				}
			}
		}
	}
}

// TestRotationCrash: wherever a crash stops a rotation, nothing that shall be kept is lost or doubled, and the gap is filled again.
func TestRotationCrash(t *testing.T) {
	formats(t, func(t *testing.T, cfg Config) {
		for stop := 1; stop <= 4; stop++ {
			cfg.Path, cfg.MaxSize, cfg.MaxFiles = filepath.Join(t.TempDir(), "log"), 100, 6
			w, path := open(t, cfg)
			s := w.Stream("stdout", nil)
			for i := range 5 { // files 4 … 0
				fmt.Fprintf(s, "line %d%s\n", i, strings.Repeat(".", 90))
			}
			w.Close()
			ext := ""
			if cfg.Compress {
				ext = ".gz"
			}
			for i := 4; i >= stop; i-- { // a rotation that ends with a gap at stop
				if err := os.Rename(numbered(path, i)+ext, numbered(path, i+1)+ext); err != nil {
					t.Fatal(err)
				}
			}
			if cfg.Compress {
				os.WriteFile(zipped(path, 1)+".new", []byte("half"), 0o600)
			}
			w, _ = open(t, cfg)
			s = w.Stream("stdout", nil)
			for i := 5; i < 7; i++ {
				want := i
				for n, l := range read(t, path, Options{}) {
					if !strings.HasPrefix(l, fmt.Sprintf("out:line %d", n+max(0, i-6))) {
						t.Errorf("gap at %d, before %d: line %d is %.12q", stop, i, n, l)
					}
					want--
				}
				if want != max(0, i-6) {
					t.Errorf("gap at %d, before %d: %d lines missing", stop, i, want)
				}
				fmt.Fprintf(s, "line %d%s\n", i, strings.Repeat(".", 90))
			}
			w.Close()
			if files, _ := filepath.Glob(path + "*"); len(files) != 6 {
				t.Errorf("gap at %d: files %v", stop, files)
			}
		}
	})
}

// TestNonBlocking: a full buffer drops lines instead of waiting, and counts them; what it took is written.
func TestNonBlocking(t *testing.T) {
	w, path := open(t, Config{NonBlocking: true, MaxBuffer: 500})
	w.sink.f.Close()
	stuck, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	w.sink.f = stuck
	w.mu.Lock() // the queue cannot be emptied
	w.buf = append(w.buf[:0], strings.Repeat("x", 299)+"\n"...)
	w.flush(1)
	w.flush(1)
	w.mu.Unlock()
	if n, err := w.Dropped(); n != 1 || err == nil {
		t.Errorf("dropped %d, %v; want 1 and a reason", n, err)
	}
	s := w.Stream("stdout", nil)
	for i := range 100 {
		fmt.Fprintf(s, "line %d\n", i)
	}
	if err := w.Close(); err != nil {
		t.Error(err)
	}
	fmt.Fprint(s, "late\n")
	n, _ := w.Dropped()
	if got := len(read(t, path, Options{})); got+int(n) != 102 || got == 0 {
		t.Errorf("%d lines and %d dropped, want 102 in all", got, n)
	}
}

// TestHandOver: a line whose beginning one writer had and its end the next is one line.
func TestHandOver(t *testing.T) {
	w, path := open(t, Config{NonBlocking: true})
	s := w.Stream("stdout", nil)
	fmt.Fprint(s, "one\ntw")
	rest := s.Rest()
	if !w.Flush(time.Now().Add(time.Minute)) {
		t.Fatal("not flushed")
	}
	again, _ := open(t, Config{Path: path})
	fmt.Fprint(again.Stream("stdout", rest), "o\n")
	if got := read(t, path, Options{}); fmt.Sprint(got) != "[out:one\n out:two\n]" {
		t.Errorf("got %q", got)
	}
}

// TestFollow reads everything once over many rotations, whatever the interleaving.
func TestFollow(t *testing.T) { formats(t, testFollow) }

func testFollow(t *testing.T, cfg Config) {
	cfg.MaxSize, cfg.MaxFiles = 20000, 50
	w, path := open(t, cfg)
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
		s := w.Stream("stdout", nil)
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
	w, err := Open(Config{Path: "/dev/full"})
	if err != nil {
		t.Skip(err)
	}
	defer w.Close()
	fmt.Fprint(w.Stream("stdout", nil), "a\nb\n")
	if n, err := w.Dropped(); n != 2 || err == nil {
		t.Errorf("dropped %d, %v; want 2 and a reason", n, err)
	}
}
