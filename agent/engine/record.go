package engine

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/api/types/network"
	"golang.org/x/sys/unix"

	"skein/overlay"
)

// recordFile is the name of a record in its container's directory.
const recordFile = "container.json"

// record is what rests on disk of a container, one file each.
type record struct {
	ID         string
	Name       string
	Created    time.Time
	Image      string // image id
	Config     *container.Config
	HostConfig *container.HostConfig
	Networks   map[string]*network.EndpointSettings
	Sandbox    overlay.Sandbox
	Task       string        `json:",omitempty"` // cluster task this container carries out
	Volumes    []volumeMount `json:",omitempty"`
	Inherited  []mount.Mount `json:",omitempty"` // binds of other containers
	// HostPorts are a task's in mode host; the mesh publishes them.
	HostPorts []overlay.HostPort `json:",omitempty"`
	Files     []depFile          `json:",omitempty"` // secrets and configs of a task
	Attached  bool               `json:",omitempty"` // holds addresses on networks of the cluster though it is no task
	Links     []containerLink    `json:",omitempty"` // of the default bridge network
	State     state
}

// state is the changing part of a record.
type state struct {
	Status        container.ContainerState
	Pid           int
	ExitCode      int
	OOMKilled     bool
	Error         string
	StartedAt     time.Time
	FinishedAt    time.Time
	RestartCount  int
	Backoff       int  `json:",omitempty"` // short runs in a row; decides the delay of the next restart
	StoppedByUser bool // no restart policy applies
	Clean         bool // runtime state and sandbox of the last run are removed
}

// published lists the ports that are reached by addresses of this node.
func (r record) published() []overlay.HostPort {
	out := slices.Clone(r.HostPorts)
	for _, b := range r.Sandbox.Bridges {
		out = append(out, b.Ports...)
	}
	return out
}

func (s state) active() bool {
	return s.Status == container.StateRunning || s.Status == container.StatePaused
}

// entry is a container in memory.
type entry struct {
	op sync.Mutex // serialises start, stop, remove

	mu        sync.Mutex // guards the rest; never held across I/O other than the record's file
	rec       record
	saved     [sha256.Size]byte // of the record's file as written last
	changed   chan struct{}     // closed and replaced at each change of state
	exits     int               // ends of runs seen since the daemon started
	failures  int               // starts that did not become a run
	gone      bool              // its record is deleted and not written again
	removed   bool              // and everything of it is gone
	attachers []*attacher       // clients that wait for the next start
	health    *health           // probes of the current run, nil without
}

// snapshot returns a copy of the record; maps and pointers in it are not changed after creation except through update.
func (c *entry) snapshot() record {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.rec
}

// watch returns the record and a channel that is closed at its next change.
func (c *entry) watch() (r record, exits int, removed bool, changed <-chan struct{}) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.rec, c.exits, c.removed, c.changed
}

// attempts counts starts that have come to an end, one way or the other.
func (c *entry) attempts() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.exits + c.failures
}

// lock serialises operations on the container; a container that was removed meanwhile is not found.
func (c *entry) lock() error {
	c.op.Lock()
	if r, _, removed, _ := c.watch(); removed {
		c.op.Unlock()
		return notFound("No such container: %s", r.ID)
	}
	return nil
}

// update changes the record, writes it if that changed anything, and wakes who watches.
func (e *Engine) update(c *entry, f func(*record)) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.gone {
		return nil
	}
	f(&c.rec)
	b, err := json.Marshal(c.rec)
	if sum := sha256.Sum256(b); err == nil && sum != c.saved {
		if err = writeFile(filepath.Join(e.containerDir(c.rec.ID), recordFile), b, durable); err == nil {
			c.saved = sum
		}
	}
	close(c.changed)
	c.changed = make(chan struct{})
	if err != nil {
		return e.diskError("write the record of container "+c.rec.Name, err)
	}
	return nil
}

// diskError names the disk and the way out when it is full.
func (e *Engine) diskError(what string, err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return errf(cerrdefs.ErrResourceExhausted, "%s: disk of %s is full: free some space, or remove containers and images that are not needed", what, e.cfg.StateDir)
	}
	return fmt.Errorf("%s: %w", what, err)
}

func (e *Engine) loadContainers() error {
	dirs, err := os.ReadDir(filepath.Join(e.cfg.StateDir, "containers"))
	if err != nil {
		return fmt.Errorf("read container records: %w", err)
	}
	for _, d := range dirs {
		path := filepath.Join(e.containerDir(d.Name()), recordFile)
		b, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) { // crashed while creating or after removing
			if err := os.RemoveAll(e.containerDir(d.Name())); err != nil {
				return fmt.Errorf("remove the rest of container %s: %w", d.Name(), err)
			}
			continue
		}
		var r record
		if err == nil {
			err = json.Unmarshal(b, &r)
		}
		if err != nil {
			return fmt.Errorf("container record %s: %w: move the directory away to start without this container", path, err)
		}
		c := &entry{rec: r, changed: make(chan struct{})}
		e.containers[r.ID] = c
		e.names[r.Name] = r.ID
		if r.Task != "" {
			e.tasks[r.Task] = c
		}
	}
	if b, err := os.ReadFile(filepath.Join(e.cfg.StateDir, "last-event")); err == nil {
		e.lastEvent, _ = strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
	}
	return nil
}

// writeJSON replaces path atomically and durably.
func writeJSON(path string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return writeFile(path, b, durable)
}

// durability says what a written file survives: the end of the machine, or only that of this process.
type durability bool

const (
	durable  durability = true
	volatile durability = false
)

// writeFile replaces path atomically.
func writeFile(path string, b []byte, keep durability) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".tmp-*")
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil && keep == durable {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		_ = os.Remove(f.Name())
	}
	return err
}

func newContainerID() string {
	var b [32]byte
	if _, err := rand.Read(b[:]); err != nil {
		panic(err) // getrandom(2) does not fail
	}
	return hex.EncodeToString(b[:])
}

func loadID(path string) (string, error) {
	b, err := os.ReadFile(path)
	if err == nil {
		return strings.TrimSpace(string(b)), nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("engine id: %w", err)
	}
	id := newContainerID()[:32]
	if err := writeFile(path, []byte(id+"\n"), durable); err != nil {
		return "", fmt.Errorf("engine id: %w", err)
	}
	return id, nil
}
