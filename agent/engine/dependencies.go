package engine

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strconv"

	"github.com/moby/moby/api/types/swarm"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"skein/manager/api"
)

// Secrets and configs of tasks are files in memory, never on a disk: in a directory of each task below the run directory, bound into the
// container read-only.

const (
	secretsDir      = "/run/secrets"
	defaultFileMode = 0o444
)

// depFile is a secret or config in a container's record.
type depFile struct {
	Source string // below the run directory
	Target string
}

// dependencyFile is what a task wants of one secret or config.
type dependencyFile struct {
	kind, id, name string
	target         string
	uid, gid       string
	mode           fs.FileMode
}

// dependencyFiles lists what the spec wants, with absolute targets.
func dependencyFiles(c *swarm.ContainerSpec) []dependencyFile {
	var out []dependencyFile
	add := func(f dependencyFile, dir string) {
		if !path.IsAbs(f.target) {
			f.target = path.Join(dir, f.target)
		}
		f.target = path.Clean(f.target)
		out = append(out, f)
	}
	for _, r := range c.Secrets {
		if r.File != nil {
			add(dependencyFile{"secret", r.SecretID, r.SecretName, r.File.Name, r.File.UID, r.File.GID, r.File.Mode}, secretsDir)
		}
	}
	for _, r := range c.Configs {
		if r.File != nil {
			add(dependencyFile{"config", r.ConfigID, r.ConfigName, r.File.Name, r.File.UID, r.File.GID, r.File.Mode}, "/")
		}
	}
	return out
}

// provide writes the task's secrets and configs. What the managers have not sent yet is an ordinary error, to be tried again.
func (t *taskController) provide() ([]depFile, error) {
	wanted := dependencyFiles(t.spec.ContainerSpec)
	if len(wanted) == 0 {
		return nil, nil
	}
	dir, err := t.e.memoryDir(t.a.TaskId)
	if err != nil {
		return nil, err
	}
	var out []depFile
	for i, w := range wanted {
		content, err := t.content(w)
		if err != nil {
			return nil, err
		}
		f := depFile{Source: filepath.Join(dir, strconv.Itoa(i)), Target: w.target}
		if err := writeOwned(f.Source, content, w); err != nil {
			return nil, fmt.Errorf("%s %s: %w", w.kind, w.name, err)
		}
		out = append(out, f)
	}
	return out, nil
}

// content is a secret's or config's, its template expanded if it is one.
func (t *taskController) content(w dependencyFile) ([]byte, error) {
	data, templated, err := t.raw(w.kind, w.id, w.name)
	if err != nil || !templated {
		return data, err
	}
	x := expander{a: t.a, hostname: t.e.cfg.Hostname, lookup: t.lookup, env: t.spec.ContainerSpec.Env, secret: w.kind == "secret"}
	text := x.expand(string(data))
	if x.err != nil {
		return nil, fmt.Errorf("%s %s: %w", w.kind, w.name, x.err)
	}
	return []byte(text), nil
}

// lookup is what templates reach: the task's own secrets and configs, by their target.
func (t *taskController) lookup(kind, target string) (string, error) {
	c := t.spec.ContainerSpec
	for _, r := range c.Secrets {
		if kind == "secret" && r.File != nil && r.File.Name == target {
			data, _, err := t.raw(kind, r.SecretID, r.SecretName)
			return string(data), err
		}
	}
	for _, r := range c.Configs {
		if kind == "config" && r.File != nil && r.File.Name == target {
			data, _, err := t.raw(kind, r.ConfigID, r.ConfigName)
			return string(data), err
		}
	}
	return "", fmt.Errorf("%s target %s not found", kind, target)
}

func (t *taskController) raw(kind, id, name string) (data []byte, templated bool, err error) {
	var d *api.DependencyRecord
	if t.dependency != nil {
		d = t.dependency(id)
	}
	if d == nil || d.Kind != kind {
		return nil, false, fmt.Errorf("%s %s: the managers have not sent it to this node yet", kind, name)
	}
	var spec struct{ Templating *swarm.Driver }
	if err := json.Unmarshal(d.SpecJson, &spec); err != nil {
		return nil, false, fmt.Errorf("%s %s: its specification cannot be read: %w", kind, name, err)
	}
	return d.Data, spec.Templating != nil && spec.Templating.Name != "", nil
}

// writeOwned writes a file anew; nobody sees it half or with other rights.
func writeOwned(path string, content []byte, w dependencyFile) error {
	uid, err := ownerID(w.uid)
	if err != nil {
		return err
	}
	gid, err := ownerID(w.gid)
	if err != nil {
		return err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	mode := w.mode.Perm()
	if w.mode == 0 {
		mode = defaultFileMode
	}
	_, err = f.Write(content)
	return errors.Join(err, f.Chown(uid, gid), f.Chmod(mode), f.Close())
}

func ownerID(s string) (int, error) {
	if s == "" {
		return 0, nil
	}
	n, err := strconv.ParseUint(s, 10, 32)
	if err != nil || n == 1<<32-1 {
		return 0, invalid("owner %q is not a numeric id", s)
	}
	return int(n), nil
}

func (e *Engine) dependenciesDir() string { return filepath.Join(e.cfg.RunDir, "dependencies") }

// memoryDir makes the directory of a task's files. Where the run directory is on a disk, a tmpfs is mounted for all of them.
func (e *Engine) memoryDir(task string) (string, error) {
	base := e.dependenciesDir()
	if err := os.MkdirAll(base, 0o700); err != nil {
		return "", fmt.Errorf("directory of secrets: %w", err)
	}
	e.memory.Lock()
	defer e.memory.Unlock()
	var st unix.Statfs_t
	if err := unix.Statfs(base, &st); err != nil {
		return "", fmt.Errorf("directory of secrets %s: %w", base, err)
	}
	if st.Type != unix.TMPFS_MAGIC && st.Type != unix.RAMFS_MAGIC {
		if err := unix.Mount("skein", base, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700"); err != nil {
			return "", fmt.Errorf("mount memory for secrets on %s: %w", base, err)
		}
	}
	dir := filepath.Join(base, task)
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", fmt.Errorf("directory of secrets: %w", err)
	}
	return dir, nil
}

// removeFiles removes the secrets and configs of a task, and the memory they were in with the last.
func (e *Engine) removeFiles(task string) error {
	if task == "" {
		return nil
	}
	e.memory.Lock()
	defer e.memory.Unlock()
	base := e.dependenciesDir()
	if err := os.RemoveAll(filepath.Join(base, task)); err != nil {
		return err
	}
	if left, err := os.ReadDir(base); err != nil || len(left) > 0 {
		return nil
	}
	if err := unix.Unmount(base, 0); err != nil && !errors.Is(err, unix.EINVAL) { // not a mount: /run itself is in memory
		return fmt.Errorf("unmount memory for secrets %s: %w", base, err)
	}
	if err := os.Remove(base); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// removeOrphanFiles removes those of tasks that have no container.
func (e *Engine) removeOrphanFiles() error {
	entries, err := os.ReadDir(e.dependenciesDir())
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	}
	var errs []error
	for _, d := range entries {
		if e.taskContainer(d.Name()) == nil {
			errs = append(errs, e.removeFiles(d.Name()))
		}
	}
	return errors.Join(errs...)
}

// fileMounts binds a container's secrets and configs.
func fileMounts(r record) []specs.Mount {
	var out []specs.Mount
	for _, f := range r.Files {
		out = append(out, specs.Mount{Destination: f.Target, Type: "bind", Source: f.Source, Options: []string{"bind", "rprivate", "ro", "nosuid", "nodev", "noexec"}})
	}
	return out
}
