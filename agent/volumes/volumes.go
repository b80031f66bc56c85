// Package volumes keeps this node's local volumes: directories that outlive containers.
//
// A volume is STATE/NAME with its record and its data; the record is written last and removed first, so that a crash leaves no half
// volume: New clears what has none. Names are checked before they become paths. Filling a volume from an image copies by handles only and
// appears in one step. The package knows nothing of containers: whether a volume is in use is its caller's to say. Used by agent/engine.
package volumes

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Volume is one volume's record.
type Volume struct {
	Name      string
	Created   time.Time
	Labels    map[string]string
	Anonymous bool // made for one container, removed with it
}

// Store is the volumes under one directory. Methods are safe for concurrent use.
type Store struct {
	dir string
	mu  sync.Mutex
	m   map[string]Volume
}

const (
	recordFile = "volume.json"
	dataDir    = "_data"
	newDir     = "_new" // data being filled
)

var validName = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]{1,127}$`)

// CheckName refuses what cannot be a volume's name.
func CheckName(name string) error {
	if !validName.MatchString(name) {
		return fmt.Errorf("%q includes invalid characters for a local volume name, only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed: %w", name, errdefs.ErrInvalidArgument)
	}
	return nil
}

// New reads the volumes under dir, which it makes, and removes what a crash left half made or half removed.
func New(dir string) (*Store, error) {
	if err := os.MkdirAll(dir, 0o701); err != nil {
		return nil, fmt.Errorf("volumes: %w", err)
	}
	s := &Store{dir: dir, m: map[string]Volume{}}
	list, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("read volumes: %w", err)
	}
	for _, d := range list {
		b, err := os.ReadFile(filepath.Join(dir, d.Name(), recordFile))
		if errors.Is(err, fs.ErrNotExist) {
			if err := os.RemoveAll(filepath.Join(dir, d.Name())); err != nil {
				return nil, fmt.Errorf("remove the rest of volume %s: %w", d.Name(), err)
			}
			continue
		}
		var v Volume
		if err == nil {
			err = json.Unmarshal(b, &v)
		}
		if err == nil && v.Name != d.Name() {
			err = fmt.Errorf("it names volume %q", v.Name)
		}
		if err != nil {
			return nil, fmt.Errorf("record of volume %s: %w: move the directory away to start without this volume", d.Name(), err)
		}
		s.m[v.Name] = v
	}
	return s, nil
}

// Create makes the volume unless it exists, and reports whether it did.
func (s *Store) Create(name string, labels map[string]string, anonymous bool) (v Volume, created bool, err error) {
	if err := CheckName(name); err != nil {
		return v, false, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if v, ok := s.m[name]; ok {
		return v, false, nil
	}
	v = Volume{Name: name, Created: time.Now().UTC(), Labels: labels, Anonymous: anonymous}
	dir := filepath.Join(s.dir, name)
	err = os.MkdirAll(filepath.Join(dir, dataDir), 0o755)
	if err == nil {
		err = os.Chmod(dir, 0o701) // its data are for the containers' users, by their own modes
	}
	if err == nil {
		err = writeRecord(dir, v)
	}
	if err != nil {
		_ = os.RemoveAll(dir)
		return Volume{}, false, fmt.Errorf("create volume %s: %w", name, err)
	}
	s.m[name] = v
	return v, true, nil
}

func writeRecord(dir string, v Volume) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(dir, ".tmp-*")
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), filepath.Join(dir, recordFile))
	}
	return err
}

// Get finds a volume.
func (s *Store) Get(name string) (Volume, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	v, ok := s.m[name]
	if !ok {
		return v, fmt.Errorf("get %s: no such volume: %w", name, errdefs.ErrNotFound)
	}
	return v, nil
}

// List returns all volumes by name.
func (s *Store) List() []Volume {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]Volume, 0, len(s.m))
	for _, v := range s.m {
		out = append(out, v)
	}
	slices.SortFunc(out, func(a, b Volume) int { return strings.Compare(a.Name, b.Name) })
	return out
}

// Path is the directory to mount.
func (s *Store) Path(name string) string { return filepath.Join(s.dir, name, dataDir) }

// Remove deletes the volume and its data, which must not be in use.
func (s *Store) Remove(name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.m[name]; !ok {
		return fmt.Errorf("get %s: no such volume: %w", name, errdefs.ErrNotFound)
	}
	dir := filepath.Join(s.dir, name)
	if err := os.Remove(filepath.Join(dir, recordFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove volume %s: %w", name, err)
	}
	if err := os.RemoveAll(dir); err != nil { // os.RemoveAll follows no links and goes by handles
		return fmt.Errorf("remove volume %s: %w", name, err)
	}
	delete(s.m, name)
	return nil
}

// Empty reports whether nothing is in the volume yet.
func (s *Store) Empty(name string) (bool, error) {
	f, err := os.Open(s.Path(name))
	if err != nil {
		return false, fmt.Errorf("read volume %s: %w", name, err)
	}
	defer f.Close()
	_, err = f.Readdirnames(1)
	if errors.Is(err, io.EOF) {
		return true, nil
	}
	return false, err
}

// Populate fills an empty volume with a copy of the directory src, its owner and mode included. All or nothing appears; nobody may
// have the volume mounted. Links in src are copied, never followed.
func (s *Store) Populate(name string, src *os.File) error {
	dir := filepath.Join(s.dir, name)
	tmp := filepath.Join(dir, newDir)
	if err := os.RemoveAll(tmp); err != nil {
		return fmt.Errorf("fill volume %s: %w", name, err)
	}
	err := os.Mkdir(tmp, 0o700)
	if err == nil {
		err = copyInto(tmp, src)
	}
	if err == nil {
		err = unix.Rename(tmp, s.Path(name)) // replaces an empty directory only; os.Rename replaces none
	}
	if err != nil {
		_ = os.RemoveAll(tmp)
		return fmt.Errorf("fill volume %s from the image: %w", name, err)
	}
	return nil
}

// Size is the bytes of the volume's files.
func (s *Store) Size(name string) int64 {
	var sum int64
	_ = filepath.WalkDir(s.Path(name), func(_ string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			if i, err := d.Info(); err == nil {
				sum += i.Size()
			}
		}
		return nil // a figure for people: what is gone meanwhile does not count
	})
	return sum
}
