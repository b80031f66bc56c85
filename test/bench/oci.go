package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"skein/runtime/cgroup"
	"skein/runtime/sandbox"
	"skein/test/images"
)

// hiddenWord makes this program measure OCI commands in a mount namespace without the v2 side of a hybrid host, which some runtimes refuse.
const hiddenWord = "oci-hidden"

// command is an OCI runtime's.
type command struct{ Name, Path string }

// commands are skein-oci, what is installed, and what -crun and -runc name.
func (b *bench) commands() []command {
	out := []command{{"skein-oci", filepath.Join(b.dir, "skein-oci")}}
	for _, given := range []struct{ name, paths string }{{"crun", b.opts.crun}, {"runc", b.opts.runc}} {
		list := strings.FieldsFunc(given.paths, func(r rune) bool { return r == ',' })
		if p, err := exec.LookPath(given.name); err == nil {
			list = append(list, p)
		}
		for _, p := range list {
			out = append(out, command{given.name, p})
		}
	}
	for i, c := range out[1:] {
		if v := strings.Fields(versionOf(c.Path)); len(v) > 2 {
			out[i+1].Name += " " + v[2]
		}
	}
	return out
}

// versionOf is the first line that a runtime says of itself.
func versionOf(path string) string {
	b, err := exec.Command(path, "--version").Output()
	if err != nil {
		return ""
	}
	line, _, _ := strings.Cut(string(b), "\n")
	return line
}

// oci measures OCI commands, interleaved. It starts this program again in a mount namespace of its own.
func (b *bench) oci(ctx context.Context) error {
	if err := images.Build(ctx, filepath.Join(b.dir, "skein-oci"), "skein/cmd/skein-oci"); err != nil {
		return err
	}
	list, err := json.Marshal(b.commands())
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "/proc/self/exe", hiddenWord, b.dir, fmt.Sprint(b.opts.rounds), string(list))
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS}
	return cmd.Run()
}

// hidden is the second start of oci.
func hidden(ctx context.Context, dir, rounds, list string) error {
	m := &ociBench{dir: dir, group: fmt.Sprintf("/skein-bench-oci-%d", os.Getpid())}
	if _, err := fmt.Sscan(rounds, &m.rounds); err != nil {
		return err
	}
	if err := json.Unmarshal([]byte(list), &m.commands); err != nil {
		return err
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("keep mounts to this process: %w", err)
	}
	if err := unix.Unmount("/sys/fs/cgroup/unified", unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("hide cgroup v2: %w", err)
	}
	err := m.run(ctx)
	named, _ := filepath.Glob("/sys/fs/cgroup/systemd" + m.group + "*") // which other runtimes make and leave
	for _, g := range named {
		_ = os.Remove(g)
	}
	return errors.Join(err, cgroup.KillTree(m.group), cgroup.RemoveTree(m.group))
}

// ociBench is what is measured of OCI commands.
type ociBench struct {
	dir, group string
	rounds     int
	commands   []command
	serial     int
}

// minSpec is a container with as little as it takes.
func minSpec(args ...string) *specs.Spec {
	s := sandbox.DefaultSpec()
	s.Version = "1.0.2"
	s.Process.Args = append([]string{"/noop"}, args...)
	s.Mounts = s.Mounts[:2] // proc and dev
	s.Linux.Namespaces = []specs.LinuxNamespace{{Type: specs.MountNamespace}, {Type: specs.PIDNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace}}
	s.Linux.MaskedPaths, s.Linux.ReadonlyPaths, s.Linux.Seccomp, s.Linux.Resources = nil, nil, nil, nil
	return s
}

func (m *ociBench) run(ctx context.Context) error {
	for _, kind := range []struct {
		name string
		spec *specs.Spec
	}{{"full", fullSpec("true")}, {"min", minSpec("true")}} {
		for _, how := range []struct {
			name string
			do   func(context.Context, command, string, string) (time.Duration, error)
		}{{"run", m.once}, {"create+start+delete", m.steps}} {
			for _, rest := range []time.Duration{0, restTime} {
				name := label(fmt.Sprintf("%s %s, ", how.name, kind.name), rest)
				if err := m.compare(ctx, name, kind.spec, rest, how.do); err != nil {
					return fmt.Errorf("%s: %w", name, err)
				}
			}
		}
	}
	return nil
}

// compare runs all commands in turns. One that fails in its first round is left out.
func (m *ociBench) compare(ctx context.Context, name string, spec *specs.Spec, rest time.Duration, do func(context.Context, command, string, string) (time.Duration, error)) error {
	walls, cpus, left := map[string][]time.Duration{}, map[string]time.Duration{}, m.commands
	for round := -2; round < m.rounds; round++ { // the first two warm up
		for _, c := range slices.Clone(left) {
			m.serial++
			id := fmt.Sprintf("b%d-%d", os.Getpid(), m.serial)
			bundle, err := m.bundle(id, spec)
			if err != nil {
				return err
			}
			time.Sleep(rest)
			begun := time.Now()
			cpu, err := do(ctx, c, id, bundle)
			wall := time.Since(begun)
			err = errors.Join(err, ctx.Err(), os.RemoveAll(bundle))
			switch {
			case err != nil && round == -2 && c.Name != "skein-oci" && ctx.Err() == nil:
				fmt.Printf("  %s%s is left out: %v\n", name, c.Name, err)
				left = slices.DeleteFunc(slices.Clone(left), func(x command) bool { return x == c })
			case err != nil:
				return fmt.Errorf("%s: %w", c.Name, err)
			case round >= 0:
				walls[c.Name] = append(walls[c.Name], wall)
				cpus[c.Name] += cpu
			}
		}
	}
	for _, c := range left {
		row(name+c.Name, walls[c.Name], cpus[c.Name])
	}
	return nil
}

// bundle makes a bundle whose root file system holds the program alone.
func (m *ociBench) bundle(id string, spec *specs.Spec) (string, error) {
	dir := filepath.Join(m.dir, "bundles", id)
	for _, sub := range []string{"rootfs/proc", "rootfs/dev", "rootfs/sys"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o755); err != nil {
			return "", err
		}
	}
	if err := os.Link(filepath.Join(m.dir, "noop"), filepath.Join(dir, "rootfs/noop")); err != nil {
		return "", err
	}
	s := *spec
	linux := *spec.Linux
	s.Root, s.Linux = &specs.Root{Path: "rootfs"}, &linux
	s.Linux.CgroupsPath = m.group + "/" + id
	b, err := json.Marshal(s)
	if err != nil {
		return "", err
	}
	return dir, os.WriteFile(filepath.Join(dir, "config.json"), b, 0o600)
}

// call runs one command and returns the CPU time of it and of what it waited for.
func (m *ociBench) call(ctx context.Context, c command, args ...string) (time.Duration, error) {
	root := filepath.Join(m.dir, "state-"+strings.ReplaceAll(c.Name, " ", "-"))
	cmd := exec.CommandContext(ctx, c.Path, append([]string{"--root", root}, args...)...)
	stderr := filepath.Join(m.dir, "stderr") // a file: a pipe would be held open by the container
	f, err := os.Create(stderr)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	cmd.Stderr = f
	if err := cmd.Run(); err != nil {
		why, _ := os.ReadFile(stderr)
		return 0, fmt.Errorf("%s %s: %w: %s", c.Path, args[0], err, strings.TrimSpace(string(why)))
	}
	return cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime(), nil
}

// once is `run`.
func (m *ociBench) once(ctx context.Context, c command, id, bundle string) (time.Duration, error) {
	return m.call(ctx, c, "run", "--bundle", bundle, id)
}

// deleteTries bounds the attempts at deleting a container that is just ending.
const deleteTries = 400

// steps is create, start, and delete once the container has ended.
func (m *ociBench) steps(ctx context.Context, c command, id, bundle string) (cpu time.Duration, err error) {
	for _, args := range [][]string{{"create", "--bundle", bundle, id}, {"start", id}} {
		one, err := m.call(ctx, c, args...)
		if err != nil {
			return 0, err
		}
		cpu += one
	}
	for range deleteTries {
		var one time.Duration
		if one, err = m.call(ctx, c, "delete", id); err == nil {
			return cpu + one, nil
		}
		time.Sleep(time.Millisecond) // nothing tells when it has ended
	}
	return 0, err
}
