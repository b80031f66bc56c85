package oci

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Discard removes what a creator that was killed left of a container, and any container that exists after all. While a creator is at
// work it is waited for. A container that is not there at all is not found.
func (r *Runtime) Discard(id string) error {
	dir, err := r.dir(id)
	if err != nil {
		return err
	}
	lock, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("container %q does not exist: %w", id, errdefs.ErrNotFound)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return fmt.Errorf("container %q: lock: %w", id, err)
	}
	c, err := r.Open(id, false)
	if err == nil {
		defer c.Close()
		return c.Delete(true)
	}
	c = &Container{rt: r, dir: dir}
	if b, err := os.ReadFile(filepath.Join(dir, recordFile+".new")); err == nil && json.Unmarshal(b, &c.rec) == nil && c.rec.Cgroup != "" {
		return c.Delete(true)
	}
	return c.discard(id)
}

// discard removes a container of which only the config was written: its groups, and the process that may wait in them.
func (c *Container) discard(id string) error {
	var errs []error
	if s, _, err := readConfig(filepath.Join(c.dir, configFile)); err == nil {
		complete(s, "/")
		if c.rec.Cgroup = s.Linux.CgroupsPath; c.rec.Cgroup == "" {
			c.rec.Cgroup = filepath.Join(cgroupParent, id)
		}
		errs = append(errs, c.endWaiting())
	}
	return errors.Join(append(errs, os.RemoveAll(c.dir))...)
}

// endWaiting kills those processes of the group that have not executed yet, known by the file that they show, and removes the group
// when nobody else is in it.
func (c *Container) endWaiting() error {
	g, err := c.group()
	if err != nil {
		return nil // such a config was refused before anything was made
	}
	pids, err := g.Processes()
	if err != nil {
		return err
	}
	for _, pid := range pids {
		if exe, _ := os.Readlink("/proc/" + strconv.Itoa(pid) + "/exe"); !strings.HasPrefix(exe, "/memfd:none") {
			return nil // the group has a life of its own
		}
	}
	for _, pid := range pids {
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			continue
		}
		_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
		awaitExit(fd, int(killLimit.Milliseconds()))
		unix.Close(fd)
	}
	return errors.Join(g.Remove(), c.removeParent())
}
