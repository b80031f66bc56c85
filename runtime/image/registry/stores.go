package registry

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// blobStore keeps bytes by digest, and what the repositories serve.
type blobStore interface {
	has(d digest.Digest) bool
	open(d digest.Digest) (io.ReadSeekCloser, error)
	put(d digest.Digest, b []byte) error
	create() (blobWriter, error)
	saveRepo(name string, p *repo) error
}

// blobWriter takes one blob. Exactly one of commit and abort has an effect, the first.
type blobWriter interface {
	io.Writer
	commit(d digest.Digest) error
	abort()
}

func wrongDigest(want, got digest.Digest) error {
	return fmt.Errorf("bytes are %s, not %s: %w", got, want, errdefs.ErrInvalidArgument)
}

func unknown(d digest.Digest) error { return fmt.Errorf("blob %s: %w", d, errdefs.ErrNotFound) }

// memory is a blobStore for tests and demos.
type memory struct {
	mu sync.RWMutex
	m  map[digest.Digest][]byte
}

func (s *memory) has(d digest.Digest) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	_, ok := s.m[d]
	return ok
}

type nopCloser struct{ io.ReadSeeker }

func (nopCloser) Close() error { return nil }

func (s *memory) open(d digest.Digest) (io.ReadSeekCloser, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	b, ok := s.m[d]
	if !ok {
		return nil, unknown(d)
	}
	return nopCloser{bytes.NewReader(b)}, nil
}

func (s *memory) put(d digest.Digest, b []byte) error {
	if got := d.Algorithm().FromBytes(b); got != d {
		return wrongDigest(d, got)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.m[d] = bytes.Clone(b)
	return nil
}

func (s *memory) create() (blobWriter, error) { return &memoryWriter{s: s}, nil }

func (s *memory) saveRepo(string, *repo) error { return nil }

type memoryWriter struct {
	s *memory
	b bytes.Buffer
}

func (w *memoryWriter) Write(p []byte) (int, error) { return w.b.Write(p) }

func (w *memoryWriter) commit(d digest.Digest) error { return w.s.put(d, w.b.Bytes()) }

func (w *memoryWriter) abort() { w.b = bytes.Buffer{} }

// directory is a blobStore on disk: blobs/ALGORITHM/HEX, uploads/ for what is on its way, repos/HEX.json for tags.
type directory struct{ root string }

func openDirectory(root string) (*directory, error) {
	s := &directory{root}
	// Uploads of an earlier process cannot be continued.
	if err := os.RemoveAll(filepath.Join(root, "uploads")); err != nil {
		return nil, err
	}
	for _, d := range []string{"blobs", "uploads", "repos"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o700); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// path is safe because d was validated: an algorithm and hexadecimal digits.
func (s *directory) path(d digest.Digest) string {
	return filepath.Join(s.root, "blobs", d.Algorithm().String(), d.Encoded())
}

func (s *directory) has(d digest.Digest) bool {
	if d.Validate() != nil {
		return false
	}
	_, err := os.Stat(s.path(d))
	return err == nil
}

func (s *directory) open(d digest.Digest) (io.ReadSeekCloser, error) {
	if d.Validate() != nil {
		return nil, unknown(d)
	}
	f, err := os.Open(s.path(d))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, unknown(d)
	}
	return f, err
}

func (s *directory) put(d digest.Digest, b []byte) error {
	w, err := s.create()
	if err != nil {
		return err
	}
	defer w.abort()
	if _, err := w.Write(b); err != nil {
		return err
	}
	return w.commit(d)
}

func (s *directory) create() (blobWriter, error) {
	f, err := os.CreateTemp(filepath.Join(s.root, "uploads"), "blob-")
	if err != nil {
		return nil, err
	}
	return &fileWriter{s: s, File: f}, nil
}

// fileWriter is synced before it gets its name.
type fileWriter struct {
	s *directory
	*os.File
}

func (w *fileWriter) commit(d digest.Digest) error {
	if _, err := w.Seek(0, io.SeekStart); err != nil {
		return err
	}
	got, err := d.Algorithm().FromReader(w.File)
	if err != nil {
		return err
	}
	if got != d {
		return wrongDigest(d, got)
	}
	if err := w.Sync(); err != nil {
		return err
	}
	p := w.s.path(d)
	if err := os.MkdirAll(filepath.Dir(p), 0o700); err != nil {
		return err
	}
	return os.Rename(w.Name(), p)
}

func (w *fileWriter) abort() {
	w.Close()
	os.Remove(w.Name()) // gone after a commit
}

func (s *directory) saveRepo(name string, p *repo) error {
	b, err := json.Marshal(p)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Join(s.root, "uploads"), "repo-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	if _, err := f.Write(b); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	return os.Rename(f.Name(), filepath.Join(s.root, "repos", hex.EncodeToString([]byte(name))+".json"))
}

func (s *directory) loadRepos() (map[string]*repo, error) {
	out := map[string]*repo{}
	files, err := os.ReadDir(filepath.Join(s.root, "repos"))
	if err != nil {
		return nil, err
	}
	for _, f := range files {
		name, err := hex.DecodeString(strings.TrimSuffix(f.Name(), ".json"))
		if err != nil {
			continue // not ours
		}
		b, err := os.ReadFile(filepath.Join(s.root, "repos", f.Name()))
		if err != nil {
			return nil, err
		}
		p := &repo{Tags: map[string]digest.Digest{}, Manifests: map[digest.Digest]string{}}
		if err := json.Unmarshal(b, p); err != nil {
			return nil, fmt.Errorf("%s: %w", f.Name(), err)
		}
		out[string(name)] = p
	}
	return out, nil
}
