package oci

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"skein/runtime/cgroup"
	"skein/runtime/sandbox"
	"skein/runtime/zygote"
)

// Runtime is one root directory of containers.
type Runtime struct {
	Root string
	Log  *slog.Logger
}

// Files of a container below its state directory.
const (
	recordFile  = "state.json"
	configFile  = "config.json"
	programFile = "program"
	gateFile    = "start.fifo" // exists until the container was started
	replyFile   = "reply.fifo"
)

// record is what is kept of a container.
type record struct {
	ID      string        `json:"id"`
	Bundle  string        `json:"bundle"`
	PID     int           `json:"pid"`
	Ticks   uint64        `json:"ticks"`
	Boot    string        `json:"boot"`
	Created time.Time     `json:"created"`
	Rootfs  string        `json:"rootfs"`
	Version string        `json:"ociVersion"`
	Cgroup  string        `json:"cgroup"`
	Made    []string      `json:"made"`  // directories of groups to remove
	Empty   bool          `json:"empty"` // no process was configured
	Hooks   bool          `json:"hooks"` // some hook is still to run after creation: the config must be read
	Execs   sandbox.Execs `json:"execs"`
	Program zygote.Record `json:"program"`
	// Listener is set when the process's seccomp filter has one to hand over.
	Listener *listener         `json:"listener,omitempty"`
	Notes    map[string]string `json:"annotations,omitempty"`
}

// Container is one container, its lock held until Close.
type Container struct {
	rt   *Runtime
	dir  string
	lock *os.File
	rec  record
	conf *specs.Spec // the completed config, when it was read
	grp  *cgroup.Group
}

// Paused is the status of a frozen container, beyond those of the specification.
const Paused specs.ContainerState = "paused"

func (r *Runtime) dir(id string) (string, error) {
	if id == "" {
		return "", fmt.Errorf("container id is missing: %w", errdefs.ErrInvalidArgument)
	}
	const letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_+.-"
	if len(id) > 255 || strings.Trim(id, letters) != "" || strings.Trim(id, ".") == "" || strings.ContainsFunc(id, func(c rune) bool { return !strings.ContainsRune(letters, c) }) {
		return "", fmt.Errorf("container id %q: want letters, digits and _+.-: %w", id, errdefs.ErrInvalidArgument)
	}
	return filepath.Join(r.Root, id), nil
}

// Open finds a container. With exclusive set others that change it are kept out until Close.
func (r *Runtime) Open(id string, exclusive bool) (*Container, error) {
	dir, err := r.dir(id)
	if err != nil {
		return nil, err
	}
	f, err := os.Open(dir)
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("container %q does not exist: %w", id, errdefs.ErrNotFound)
		}
		return nil, fmt.Errorf("container %q: %w", id, err)
	}
	if exclusive {
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
			f.Close()
			return nil, fmt.Errorf("container %q: lock: %w", id, err)
		}
	}
	c := &Container{rt: r, dir: dir, lock: f}
	b, err := os.ReadFile(filepath.Join(dir, recordFile))
	if err == nil {
		err = json.Unmarshal(b, &c.rec)
	}
	if err != nil {
		f.Close()
		if errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("container %q does not exist: its creation has not finished; if its creator is gone, delete it by force: %w", id, errdefs.ErrNotFound)
		}
		return nil, fmt.Errorf("container %q: read state: %w", id, err)
	}
	return c, nil
}

// Close lets others change the container.
func (c *Container) Close() { c.lock.Close() }

// write prepares the record beside the one that others read, publish puts it in its place.
func (c *Container) write() error {
	b, err := json.Marshal(&c.rec)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(c.dir, recordFile+".new"), b, 0o600); err != nil {
		return fmt.Errorf("write state: %w", err)
	}
	return nil
}

func (c *Container) publish() error {
	return os.Rename(filepath.Join(c.dir, recordFile+".new"), filepath.Join(c.dir, recordFile))
}

// spec is the config as it was when the container was created.
func (c *Container) spec() (*specs.Spec, error) {
	if c.conf != nil {
		return c.conf, nil
	}
	s, _, err := readConfig(filepath.Join(c.dir, configFile))
	if err != nil {
		return nil, err
	}
	complete(s, c.rec.Bundle)
	c.conf = s
	return s, nil
}

// laterHooks are those that run after creation; most containers have none, and then the config is not read again.
func (c *Container) laterHooks() (*specs.Hooks, *specs.Spec, error) {
	if !c.rec.Hooks {
		return &specs.Hooks{}, nil, nil
	}
	s, err := c.spec()
	if err != nil {
		return nil, nil, err
	}
	return s.Hooks, s, nil
}

func (c *Container) group() (*cgroup.Group, error) {
	if c.grp != nil {
		return c.grp, nil
	}
	h, err := cgroup.Probe()
	if err == nil {
		c.grp, err = h.OpenPath(c.rec.Cgroup)
	}
	return c.grp, err
}

func hasLaterHooks(h *specs.Hooks) bool {
	return h != nil && len(h.StartContainer)+len(h.Poststart)+len(h.Poststop) > 0
}

// alive says whether the container's first process is still that process and not a zombie.
func (c *Container) alive() bool {
	if c.rec.PID <= 0 || c.rec.Boot != bootID() {
		return false
	}
	state, ticks, err := procStat(c.rec.PID)
	return err == nil && ticks == c.rec.Ticks && state != "Z" && state != "X"
}

// Status of the container now.
func (c *Container) Status() specs.ContainerState {
	if !c.alive() {
		return specs.StateStopped
	}
	if _, err := os.Stat(filepath.Join(c.dir, gateFile)); err == nil {
		return specs.StateCreated
	}
	if g, err := c.group(); err == nil && g.Frozen() {
		return Paused
	}
	return specs.StateRunning
}

// State as the specification wants it told.
func (c *Container) State() specs.State {
	s := specs.State{Version: specs.Version, ID: c.rec.ID, Status: c.Status(), Bundle: c.rec.Bundle, Annotations: c.rec.Notes}
	if s.Status != specs.StateStopped {
		s.Pid = c.rec.PID
	}
	return s
}

// Info is a line of a list.
type Info struct {
	specs.State
	Rootfs  string    `json:"rootfs"`
	Created time.Time `json:"created"`
}

// Info is State with what a list shows beyond it.
func (c *Container) Info() Info { return Info{c.State(), c.rec.Rootfs, c.rec.Created} }

// List tells all containers of the root.
func (r *Runtime) List() ([]Info, error) {
	entries, err := os.ReadDir(r.Root)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("list containers: %w", err)
	}
	out := []Info{}
	for _, e := range entries {
		if c, err := r.Open(e.Name(), false); err == nil {
			out = append(out, c.Info())
			c.Close()
		}
	}
	return out, nil
}

func bootID() string {
	b, _ := readSmall("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b))
}

// readSmall reads a file of the kernel of less than a page, in one call and without a poller.
func readSmall(file string) ([]byte, error) {
	fd, err := unix.Open(file, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: file, Err: err}
	}
	defer unix.Close(fd)
	b := make([]byte, 4096)
	for {
		n, err := unix.Read(fd, b)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, &os.PathError{Op: "read", Path: file, Err: err}
		}
		return b[:n], nil
	}
}

// procStat is a process's state and start time.
func procStat(pid int) (state string, ticks uint64, err error) {
	b, err := readSmall("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return "", 0, err
	}
	f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	if len(f) < 20 {
		return "", 0, fmt.Errorf("stat of process %d is malformed", pid)
	}
	ticks, err = strconv.ParseUint(f[19], 10, 64)
	return f[0], ticks, err
}

// pidfd opens the container's first process, certainly the right one.
func (c *Container) pidfd() (int, error) {
	fd, err := unix.PidfdOpen(c.rec.PID, 0)
	if err != nil {
		return -1, fmt.Errorf("container %q is not running: %w", c.rec.ID, errdefs.ErrFailedPrecondition)
	}
	if !c.alive() {
		unix.Close(fd)
		return -1, fmt.Errorf("container %q is not running: %w", c.rec.ID, errdefs.ErrFailedPrecondition)
	}
	return fd, nil
}
