package logs

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// FuzzRead: whatever is in a log file, of either format, reading it and its tail ends, in lines that are not larger than the file, and opening
// it for writing repairs it.
func FuzzRead(f *testing.F) {
	now := time.Unix(1, 5).UTC()
	for _, format := range []format{jsonFormat{}, localFormat{}} {
		b := format.appendRecord(nil, []byte("hello\n"), "stdout", now)
		b = format.appendRecord(b, []byte("part"), "stderr", now)
		f.Add(b, 1)
		f.Add(b[:len(b)-3], 2)
		f.Add(append(b, "garbage\n\x00\xff"...), 5)
	}
	f.Add([]byte(`{"log":"\u0000\ud800","stream":"x","time":"nonsense"}`+"\n{}\n\n{"), 3)
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0}, 1)
	f.Fuzz(func(t *testing.T, b []byte, tail int) {
		path := filepath.Join(t.TempDir(), "log")
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		for _, n := range []int{0, tail} {
			lines, size := 0, 0
			_ = Read(context.Background(), path, Options{Tail: n}, func(l Line) error { // may be an error that says what is damaged
				lines++
				size += len(l.Text)
				return nil
			})
			if size > 4*len(b)+4 || n > 0 && lines > n {
				t.Errorf("%d lines with %d bytes from a file of %d, tail %d", lines, size, len(b), n)
			}
		}
		for _, name := range []string{JSON, Local} {
			p := filepath.Join(t.TempDir(), "log")
			if err := os.WriteFile(p, b, 0o600); err != nil {
				t.Fatal(err)
			}
			w, err := Open(Config{Path: p, Format: name, MaxFiles: 1})
			if err != nil {
				continue
			}
			s := w.Stream("stdout", nil)
			if _, err := s.Write([]byte("after\n")); err != nil {
				t.Fatal(err)
			}
			s.Close()
			if err := w.Close(); err != nil {
				t.Fatal(err)
			}
			_ = Read(context.Background(), p, Options{Tail: 1}, func(Line) error { return nil })
		}
	})
}
