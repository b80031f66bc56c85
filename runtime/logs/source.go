package logs

import (
	"bufio"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
)

// source is one file of a log, open for reading.
type source struct {
	f      *os.File
	z      *gzip.Reader // of a compressed one
	id     string       // what a compressed one was before
	format format       // nil while the file is empty
	br     *bufio.Reader
	at     int64 // after what was read, of a plain one
}

// readBuffer holds the longest record of the local format.
const readBuffer = 32 << 10

// openSource opens number i of the log, 0 the current one; nil without error: there is none.
func openSource(path string, i int) (*source, error) {
	names := []string{path}
	if i > 0 {
		names = []string{numbered(path, i), zipped(path, i)}
	}
	for _, n := range names {
		f, err := os.Open(n)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read log: %w", err)
		}
		s := &source{f: f}
		if strings.HasSuffix(n, ".gz") && i > 0 {
			if err := s.unzip(); err != nil {
				f.Close()
				return nil, fmt.Errorf("read log %s: %w", n, err)
			}
		}
		return s, nil
	}
	return nil, nil
}

// unzip begins to read a compressed file from its start.
func (s *source) unzip() error {
	if _, err := s.f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	z, err := gzip.NewReader(s.f)
	if err != nil {
		return err
	}
	s.z, s.id, s.format = z, z.Comment, nil
	s.br = bufio.NewReaderSize(z, readBuffer)
	return nil
}

func (s *source) close() { s.f.Close() }

// same says whether both are one file, or one is the other compressed.
func (s *source) same(o *source) bool {
	if (s.z == nil) != (o.z == nil) {
		plain, packed := s, o
		if s.z != nil {
			plain, packed = o, s
		}
		id, err := identify(plain.f)
		return err == nil && id == packed.id
	}
	a, err1 := s.f.Stat()
	b, err2 := o.f.Stat()
	return err1 == nil && err2 == nil && os.SameFile(a, b)
}

// detect finds out the format; false: there is nothing in the file yet.
func (s *source) detect() (bool, error) {
	if s.format != nil {
		return true, nil
	}
	var first [1]byte
	var err error
	if s.z != nil {
		var b []byte
		if b, err = s.br.Peek(1); err == nil {
			first[0] = b[0]
		}
	} else {
		_, err = s.f.ReadAt(first[:], 0)
	}
	if errors.Is(err, io.EOF) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	s.format = jsonFormat{}
	if first[0] == localMark {
		s.format = localFormat{}
	}
	return true, nil
}

// each gives all complete records that are there now and have not been given yet.
func (s *source) each(do func(Line) error) error {
	if ok, err := s.detect(); err != nil || !ok {
		return err
	}
	if s.br == nil {
		if _, err := s.f.Seek(s.at, io.SeekStart); err != nil {
			return err
		}
		s.br = bufio.NewReaderSize(s.f, readBuffer)
	}
	for {
		l, n, ok, err := s.format.next(s.br)
		if err != nil {
			if s.z == nil {
				s.br = nil // what is torn now may be whole, or cut off, next time
			}
			if errors.Is(err, io.EOF) || errors.Is(err, errDamaged) {
				return nil
			}
			return err
		}
		s.at += int64(n)
		if !ok {
			continue
		}
		if err := do(l); err != nil {
			return err
		}
	}
}

// seekTail positions the source so that its last n records follow, and returns how many are missing.
func (s *source) seekTail(n int) (left int, err error) {
	if ok, err := s.detect(); err != nil || !ok {
		return n, err
	}
	if s.z == nil {
		st, err := s.f.Stat()
		if err != nil {
			return 0, err
		}
		s.at, left, err = s.format.tail(s.f, st.Size(), n)
		return left, err
	}
	have := 0
	if err := s.each(func(Line) error { have++; return nil }); err != nil {
		return 0, err
	}
	if err := s.unzip(); err != nil {
		return 0, err
	}
	if have <= n {
		return n - have, nil
	}
	err = s.each(func(Line) error {
		if have--; have == n {
			return errEnough
		}
		return nil
	})
	if errors.Is(err, errEnough) {
		err = nil
	}
	return 0, err
}
