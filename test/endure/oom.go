package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"
	"github.com/opencontainers/runtime-spec/specs-go"

	"skein/cmd/dev"
	"skein/runtime"
)

// tinyLimits are memory limits of which a program cannot even load, loads but not run, or runs for a while.
var tinyLimits = []int64{4 << 10, 64 << 10, 256 << 10, 1 << 20, 6 << 20}

const apiLimit = 6 << 20 // the least that the API takes

// oom starts containers that are out of memory at once: half through a supervisor, half through the API.
func (w *world) oom(ctx context.Context, n int) (err error) {
	d, err := w.newDirect(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.close(ctx)) }()
	bystander, err := d.config("bystander", "idle")
	if err != nil {
		return err
	}
	if err := d.start(ctx, bystander); err != nil {
		return err
	}
	watched, err := w.watched(ctx, d)
	if err != nil {
		return err
	}
	before := watched.look()
	kinds := map[string]int{}
	for i := 0; i < n && ctx.Err() == nil; i++ {
		var kind string
		if i%2 == 0 {
			limit := tinyLimits[i/2%len(tinyLimits)]
			kind, err = d.starve(ctx, fmt.Sprintf("o%d", i), limit)
			kind = fmt.Sprintf("%d KiB: %s", limit>>10, kind)
		} else {
			err = w.starve(ctx, fmt.Sprintf("oom-%d", i))
			kind = "API: killed"
		}
		if err != nil {
			w.breaks("start %d: %v", i, err)
		}
		kinds[kind]++
		if now := watched.look(); now != before {
			w.breaks("after %d starts: was\n%sis\n%s", i+1, before, now)
			before = now
		}
	}
	for _, k := range slices.Sorted(maps.Keys(kinds)) {
		w.figure("%s %d×", k, kinds[k])
	}
	err = d.sup.Signal(ctx, "bystander", 9)
	if err == nil {
		_, err = d.ended(ctx, "bystander")
	}
	return errors.Join(err, d.remove(ctx, "bystander"))
}

// starve starts a container that touches more than its limit; it must be killed alone and be called so.
func (d *direct) starve(ctx context.Context, id string, limit int64) (kind string, err error) {
	cfg, err := d.config(id, "touch")
	if err != nil {
		return "", err
	}
	cfg.Spec.Linux.Resources.Memory = &specs.LinuxMemory{Limit: &limit}
	if err := d.sup.Create(ctx, cfg); err != nil {
		if cerrdefs.IsInvalidArgument(err) && strings.Contains(err.Error(), "memory limit") {
			err = nil
		}
		return "killed in its set-up, refused", errors.Join(err, os.RemoveAll(filepath.Join(d.dir, "c", id)))
	}
	_, serr := d.sup.Start(ctx, id)
	x, err := d.ended(ctx, id)
	if err == nil && (x.Code != 137 || !x.OOMKilled || x.Err != "") {
		err = fmt.Errorf("container %s with %d KiB ended with %+v; start said %v", id, limit>>10, x, serr)
	}
	kind = "killed after execve"
	if serr != nil {
		kind = "killed in execve"
		if !strings.Contains(serr.Error(), "memory") || !cerrdefs.IsInvalidArgument(serr) {
			err = errors.Join(err, fmt.Errorf("container %s: start does not say that memory ran out: %w", id, serr))
		}
	}
	return kind, errors.Join(err, d.remove(ctx, id))
}

// starve does the same through the API.
func (w *world) starve(ctx context.Context, name string) error {
	res, err := w.api.ContainerCreate(ctx, client.ContainerCreateOptions{Name: name, Config: &container.Config{Image: w.image, Cmd: []string{"touch"}},
		HostConfig: &container.HostConfig{NetworkMode: "none", Resources: container.Resources{Memory: apiLimit}}})
	if err != nil {
		return err
	}
	wctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	wait := w.api.ContainerWait(wctx, res.ID, client.ContainerWaitOptions{Condition: container.WaitConditionNextExit})
	if _, err := w.api.ContainerStart(ctx, res.ID, client.ContainerStartOptions{}); err != nil {
		return err
	}
	select {
	case err := <-wait.Error:
		return err
	case <-wait.Result:
	}
	in, err := w.api.ContainerInspect(ctx, res.ID, client.ContainerInspectOptions{})
	if err != nil {
		return err
	}
	if s := in.Container.State; s.ExitCode != 137 || !s.OOMKilled {
		err = fmt.Errorf("container %s ended with %+v", name, *s)
	}
	_, rerr := w.api.ContainerRemove(ctx, res.ID, client.ContainerRemoveOptions{})
	return errors.Join(err, rerr)
}

// watched are the processes that must not notice, by what they are.
type watched map[string]int

func (w *world) watched(ctx context.Context, d *direct) (watched, error) {
	list, err := w.pids()
	if err != nil {
		return nil, err
	}
	sup, err := dev.Listener(d.cfg.SocketPath)
	if err != nil {
		return nil, err
	}
	z, err := zygotePID(sup)
	if err != nil {
		return nil, err
	}
	st, err := d.sup.State(ctx, "bystander")
	if err == nil && st.Status != runtime.Running {
		err = fmt.Errorf("the bystander is %s", st.Status)
	}
	list["direct supervisor"], list["direct zygote"], list["bystander"], list["this program"] = sup, z, st.Pid, os.Getpid()
	return list, err
}

// look tells of each whether it is the same process, what its score is, and how many were killed in its memory group.
func (l watched) look() string {
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(l)) {
		stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", l[name]))
		f := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
		started := "gone"
		if len(f) > 19 {
			started = f[19]
		}
		adj, _ := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", l[name]))
		fmt.Fprintf(&b, "  %s %d started %s score %s killed %s\n", name, l[name], started, strings.TrimSpace(string(adj)), kills(l[name]))
	}
	return b.String()
}

// kills is how many processes the memory group of a process has lost.
func kills(pid int) string {
	groups, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	for l := range strings.Lines(string(groups)) {
		f := strings.SplitN(strings.TrimSpace(l), ":", 3)
		if len(f) != 3 || f[1] != "memory" && f[0] != "0" {
			continue
		}
		for _, path := range []string{filepath.Join("/sys/fs/cgroup/memory", f[2], "memory.oom_control"), filepath.Join("/sys/fs/cgroup", f[2], "memory.events")} {
			b, _ := os.ReadFile(path)
			for l := range strings.Lines(string(b)) {
				if v, ok := strings.CutPrefix(l, "oom_kill "); ok {
					return strings.TrimSpace(v)
				}
			}
		}
	}
	return "unknown"
}
