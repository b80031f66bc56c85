package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"skein/cmd/dev"
	"skein/runtime"
	"skein/runtime/cgroup"
	"skein/runtime/sandbox"
	"skein/runtime/supervisor"
)

// direct is a supervisor without an engine: containers with all namespaces, new network included, and an overlay of one layer.
type direct struct {
	*world
	cfg  supervisor.Config
	sup  runtime.Supervisor
	dir  string
	base string // root file system below all containers

	mu    sync.Mutex
	exits map[string]chan runtime.Exit
}

func (w *world) newDirect(ctx context.Context) (*direct, error) {
	dir := filepath.Join(w.dir, "direct")
	d := &direct{world: w, dir: dir, base: filepath.Join(dir, "base"), exits: map[string]chan runtime.Exit{}, cfg: supervisor.Config{
		StateDir: filepath.Join(dir, "state"), SocketPath: filepath.Join(dir, "s.sock"), Cgroup: "/skein-endure-" + w.opts.name + "/direct"}}
	if err := os.MkdirAll(d.base, 0o755); err != nil {
		return nil, err
	}
	bin, err := os.ReadFile(filepath.Join(w.dir, "inside"))
	if err == nil {
		err = os.WriteFile(filepath.Join(d.base, "inside"), bin, 0o755)
	}
	if err == nil {
		d.sup, err = supervisor.Ensure(ctx, w.clus.Binary, d.cfg) // the daemon's file: their code is shared memory
	}
	if err != nil {
		return nil, err
	}
	ch, err := d.sup.Events(ctx, 0)
	if err != nil {
		return nil, errors.Join(err, d.close(ctx))
	}
	go func() { // ends with the client
		for ev := range ch {
			if ev.ExecID == "" {
				d.exit(ev.ContainerID) <- ev.Exit
			}
		}
	}()
	return d, nil
}

func (d *direct) site() site {
	return site{group: d.cfg.Cgroup, stateDir: d.cfg.StateDir, socket: d.cfg.SocketPath, mounts: d.dir}
}

// exit is where the end of a container will be told.
func (d *direct) exit(id string) chan runtime.Exit {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.exits[id] == nil {
		d.exits[id] = make(chan runtime.Exit, 1)
	}
	return d.exits[id]
}

// config is a container like the engine makes it.
func (d *direct) config(id string, args ...string) (runtime.Config, error) {
	root := filepath.Join(d.dir, "c", id)
	for _, sub := range []string{"root", "upper", "work"} {
		if err := os.MkdirAll(filepath.Join(root, sub), 0o755); err != nil {
			return runtime.Config{}, err
		}
	}
	s := sandbox.DefaultSpec()
	s.Process.Args = append([]string{"/inside"}, args...)
	s.Root.Path = filepath.Join(root, "root")
	s.Hostname = id
	return runtime.Config{ID: id, Spec: s, LogPath: filepath.Join(root, "log"), Rootfs: []runtime.Mount{{Type: "overlay", Source: "overlay",
		Options: []string{"lowerdir=" + d.base, "upperdir=" + filepath.Join(root, "upper"), "workdir=" + filepath.Join(root, "work")}}}}, nil
}

func (d *direct) start(ctx context.Context, cfg runtime.Config) error {
	if err := d.sup.Create(ctx, cfg); err != nil {
		return err
	}
	_, err := d.sup.Start(ctx, cfg.ID)
	return err
}

// ended waits for a container's end.
func (d *direct) ended(ctx context.Context, id string) (runtime.Exit, error) {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	select {
	case x := <-d.exit(id):
		d.mu.Lock()
		delete(d.exits, id)
		d.mu.Unlock()
		return x, nil
	case <-ctx.Done():
		return runtime.Exit{}, fmt.Errorf("the end of container %s was not told: %w", id, ctx.Err())
	}
}

// remove deletes a container and its files.
func (d *direct) remove(ctx context.Context, id string) error {
	if err := d.sup.Delete(ctx, id); err != nil {
		return err
	}
	return os.RemoveAll(filepath.Join(d.dir, "c", id))
}

// close ends the supervisor and looks for what is left of it.
func (d *direct) close(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), upTime)
	defer cancel()
	group := filepath.Dir(d.cfg.Cgroup)
	err := d.sup.Shutdown(ctx, true)
	_ = d.sup.Close()
	var left []string
	for h, list := range groups(d.cfg.Cgroup) {
		left = append(left, fmt.Sprintf("%d cgroups of %s: %.80v", len(list), h, list))
	}
	mounts, rerr := os.ReadFile("/proc/self/mountinfo")
	for l := range strings.Lines(string(mounts)) {
		if strings.Contains(l, d.dir) {
			left = append(left, "mount "+strings.TrimSpace(l))
		}
	}
	if len(left) > 0 {
		err = errors.Join(err, fmt.Errorf("the supervisor left %s", strings.Join(left, ", ")))
	}
	return errors.Join(err, rerr, cgroup.KillTree(group), cgroup.RemoveTree(group))
}

// cyclesDirect creates, starts and deletes containers one after the other, two at a time.
func (w *world) cyclesDirect(ctx context.Context, n int) (err error) {
	d, err := w.newDirect(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.close(ctx)) }()
	return w.cycle(ctx, n, cycling{
		once:  func(ctx context.Context, i int) error { return d.once(ctx, fmt.Sprintf("y%d", i)) },
		holds: func(context.Context) (holdings, error) { return d.site().holds(), nil },
		pids: func() (map[string]int, error) {
			pid, err := dev.Listener(d.cfg.SocketPath)
			return map[string]int{"supervisor": pid}, err
		},
	})
}

func (d *direct) once(ctx context.Context, id string) error {
	cfg, err := d.config(id, "lines", id, "1", "0s", "7")
	if err != nil {
		return err
	}
	if err := d.start(ctx, cfg); err != nil {
		return err
	}
	x, err := d.ended(ctx, id)
	if err == nil && (x.Code != 7 || x.OOMKilled || x.Err != "") {
		err = fmt.Errorf("container %s ended with %+v", id, x)
	}
	return errors.Join(err, d.remove(ctx, id))
}

// manyDirect runs many containers at once.
func (w *world) manyDirect(ctx context.Context, n int) (err error) {
	d, err := w.newDirect(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.close(ctx)) }()
	return w.crowd(ctx, n, crowd{
		start: func(ctx context.Context, i int) error {
			cfg, err := d.config(fmt.Sprintf("m%d", i), "idle")
			if err != nil {
				return err
			}
			return d.start(ctx, cfg)
		},
		end: func(ctx context.Context, i int) error {
			id := fmt.Sprintf("m%d", i)
			err := d.sup.Signal(ctx, id, 9)
			if err == nil {
				_, err = d.ended(ctx, id)
			}
			return errors.Join(err, d.remove(ctx, id))
		},
		count: func(ctx context.Context) (int, error) {
			list, err := d.sup.List(ctx)
			n := 0
			for _, s := range list {
				if s.Status == runtime.Running && alive(s.Pid) {
					n++
				}
			}
			return n, err
		},
		holds: func(context.Context) (holdings, error) { return d.site().holds(), nil },
		pids: func() (map[string]int, error) {
			pid, err := dev.Listener(d.cfg.SocketPath)
			if err != nil {
				return nil, err
			}
			z, err := zygotePID(pid)
			return map[string]int{"supervisor": pid, "zygote": z}, err
		},
	})
}

// awaitHolds waits until nothing more is held than before.
func awaitHolds(ctx context.Context, base holdings, now func(context.Context) (holdings, error)) error {
	return eventually(ctx, settleTime+10*time.Second, func() error {
		h, err := now(ctx)
		if more := growth(base, h); err == nil && len(more) > 0 {
			err = fmt.Errorf("more is held than before: %s", strings.Join(more, ", "))
		}
		return err
	})
}
