package logs

import (
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// sink is the current file and its rotation. It is used by one goroutine at a time.
type sink struct {
	cfg    Config
	format format
	f      *os.File
	size   int64
	packer <-chan struct{} // closed when the last rotated file is compressed, nil when nothing is under way
}

func newSink(cfg Config, f format) *sink {
	cfg.MaxFiles = max(cfg.MaxFiles, 1)
	return &sink{cfg: cfg, format: f}
}

func (s *sink) open() error {
	f, err := os.OpenFile(s.cfg.Path, os.O_CREATE|os.O_RDWR|os.O_APPEND, 0o640)
	if err != nil {
		return err
	}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return err
	}
	s.f, s.size = f, st.Size()
	if !st.Mode().IsRegular() {
		s.size = 0
		return nil
	}
	// A full disk is no reason not to go on: what is torn is skipped by readers, and the next writer tries again.
	if size, err := s.format.repair(f, s.size); err == nil || errors.Is(err, unix.ENOSPC) {
		s.size = size
	} else {
		f.Close()
		return err
	}
	return nil
}

func (s *sink) close() error {
	s.packed()
	return s.f.Close()
}

// packed waits until a rotated file is compressed.
func (s *sink) packed() {
	if s.packer != nil {
		<-s.packer
		s.packer = nil
	}
}

// write appends whole records, or none of them.
func (s *sink) write(b []byte) error {
	var rerr error
	if s.cfg.MaxSize > 0 && s.size > 0 && s.size+int64(len(b)) > s.cfg.MaxSize {
		rerr = s.rotate() // on failure it goes on in the old file
	}
	n, err := s.f.Write(b)
	if err == nil {
		s.size += int64(n)
		return nil
	}
	if n > 0 && s.f.Truncate(s.size) != nil {
		s.size += int64(n)
	}
	return errors.Join(err, rerr)
}

// rotate moves the files up by one, as far as there is no gap, and begins a new one.
func (s *sink) rotate() error {
	s.packed()
	if s.cfg.MaxFiles == 1 {
		if err := os.Remove(s.cfg.Path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("rotate log: %w", err)
		}
		return s.begin()
	}
	top := 1
	for top < s.cfg.MaxFiles-1 && s.exists(top) {
		top++
	}
	for i := top; i > 1; i-- {
		if err := s.move(i); err != nil {
			return fmt.Errorf("rotate log: %w", err)
		}
	}
	// Left by a crash when the plain file was moved on alone, or by the only kept file.
	if err := s.drop(zipped(s.cfg.Path, 1)); err != nil {
		return fmt.Errorf("rotate log: %w", err)
	}
	if err := os.Rename(s.cfg.Path, numbered(s.cfg.Path, 1)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("rotate log: %w", err)
	}
	if err := s.begin(); err != nil {
		return err
	}
	if s.cfg.Compress {
		s.packer = pack(s.cfg.Path, 1)
	}
	return nil
}

func (s *sink) exists(i int) bool {
	for _, p := range []string{numbered(s.cfg.Path, i), zipped(s.cfg.Path, i)} {
		if _, err := os.Lstat(p); err == nil {
			return true
		}
	}
	return false
}

// move gives number i to the file of number i-1, plain or compressed.
func (s *sink) move(i int) error {
	p := s.cfg.Path
	for _, m := range []struct{ from, to, other string }{{numbered(p, i-1), numbered(p, i), zipped(p, i)}, {zipped(p, i-1), zipped(p, i), numbered(p, i)}} {
		if _, err := os.Lstat(m.from); errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err := s.drop(m.other); err != nil {
			return err
		}
		return os.Rename(m.from, m.to)
	}
	return nil
}

func (s *sink) drop(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

func (s *sink) begin() error {
	old := s.f
	if err := s.open(); err != nil {
		return fmt.Errorf("rotate log: %w", err)
	}
	return old.Close()
}

// resume finishes what an earlier writer left: half-made compressed files are removed, a plain file whose compressed one is complete
// goes, and one that was not compressed is.
func (s *sink) resume() {
	if !s.cfg.Compress {
		return
	}
	for i := 1; i < s.cfg.MaxFiles; i++ {
		_ = os.Remove(zipped(s.cfg.Path, i) + ".new")
		if _, err := os.Lstat(zipped(s.cfg.Path, i)); err == nil {
			_ = os.Remove(numbered(s.cfg.Path, i))
		}
	}
	if _, err := os.Lstat(numbered(s.cfg.Path, 1)); err == nil {
		s.packer = pack(s.cfg.Path, 1)
	}
}

func numbered(path string, i int) string { return path + "." + strconv.Itoa(i) }
func zipped(path string, i int) string   { return numbered(path, i) + ".gz" }

// pack compresses a rotated file, and closes what it returns when it is done. When that fails the file stays as it is.
func pack(path string, i int) <-chan struct{} {
	done := make(chan struct{})
	go func() {
		defer close(done)
		tmp := zipped(path, i) + ".new"
		if compress(numbered(path, i), tmp) != nil || os.Rename(tmp, zipped(path, i)) != nil {
			_ = os.Remove(tmp)
			return
		}
		_ = os.Remove(numbered(path, i))
	}()
	return done
}

func compress(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o640)
	if err != nil {
		return err
	}
	defer out.Close()
	id, err := identify(in)
	if err != nil {
		return err
	}
	z, err := gzip.NewWriterLevel(out, gzip.BestSpeed)
	if err != nil {
		return err
	}
	z.Comment = id // lets a reader that had the plain file open know it again
	if _, err := io.Copy(z, in); err != nil {
		return err
	}
	if err := z.Close(); err != nil {
		return err
	}
	return out.Sync()
}

// identify names a file that is complete: its number alone may be given to another file later.
func identify(f *os.File) (string, error) {
	var st unix.Stat_t
	rc, err := f.SyscallConn()
	if err != nil {
		return "", err
	}
	cerr := rc.Control(func(fd uintptr) { err = unix.Fstat(int(fd), &st) })
	if err = errors.Join(cerr, err); err != nil {
		return "", err
	}
	return fmt.Sprintf("%d:%d:%d:%d.%09d", st.Dev, st.Ino, st.Size, st.Mtim.Sec, st.Mtim.Nsec), nil
}
