package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"

	"skein/runtime"
	"skein/runtime/supervisor"
)

// settleTime is how long everything that knows of containers may take to agree after the last operation.
const settleTime = 20 * time.Second

var containerID = regexp.MustCompile(`^[0-9a-f]{64}$`)

// audit compares everything that knows of containers: the engine's API and records, the supervisor, cgroups, processes, namespaces,
// devices, mounts, file systems. No client works meanwhile.
func (w *world) audit(ctx context.Context, base holdings) error {
	return eventually(ctx, settleTime, func() error { return w.compare(ctx, base) })
}

// known is what the engine says.
type known struct{ all, running, bridged, sandboxed map[string]bool }

func (w *world) known(ctx context.Context) (known, error) {
	k := known{map[string]bool{}, map[string]bool{}, map[string]bool{}, map[string]bool{}}
	list, err := w.api.ContainerList(ctx, client.ContainerListOptions{All: true})
	for _, c := range list.Items {
		k.all[c.ID] = true
		if c.State != container.StateRunning && c.State != container.StatePaused {
			continue
		}
		k.running[c.ID], k.sandboxed[c.ID] = true, true
		if c.HostConfig.NetworkMode == "bridge" {
			k.bridged[c.ID] = true
		}
	}
	return k, err
}

func (w *world) compare(ctx context.Context, base holdings) error {
	k, err := w.known(ctx)
	if err != nil {
		return err
	}
	errs := []error{w.compareRecords(k), w.compareSupervisor(ctx, k), w.compareKernel(k)}
	h, err := w.holds(ctx)
	if err != nil {
		return errors.Join(append(errs, err)...)
	}
	mine := holdings{}
	for kind, more := range map[string]int{"links": len(k.bridged), "mounts": len(k.sandboxed), "snapshots": len(k.all), "engine records": len(k.all)} {
		mine[kind] = base[kind] + more
		if h[kind] > mine[kind] {
			errs = append(errs, fmt.Errorf("%d %s, of which %d have an owner", h[kind], kind, mine[kind]))
		}
	}
	return errors.Join(errs...)
}

// compareRecords compares the API with the records on disk.
func (w *world) compareRecords(k known) error {
	list, err := os.ReadDir(filepath.Join(w.node.StateDir, "engine/containers"))
	if err != nil {
		return err
	}
	disk := map[string]bool{}
	for _, d := range list {
		disk[d.Name()] = true
	}
	return same("records on disk", disk, k.all)
}

// compareSupervisor compares the running ones with the supervisor's.
func (w *world) compareSupervisor(ctx context.Context, k known) error {
	sup, err := supervisor.Dial(ctx, w.supervisorSocket())
	if err != nil {
		return err
	}
	defer sup.Close()
	list, err := sup.List(ctx)
	if err != nil {
		return err
	}
	have := map[string]bool{}
	for _, s := range list {
		if s.Status == runtime.Running || s.Status == runtime.Paused {
			have[s.ID] = true
		} else if !k.running[s.ID] {
			return fmt.Errorf("the supervisor still keeps container %.12s, %s", s.ID, s.Status)
		}
	}
	return same("containers of the supervisor", have, k.running)
}

// compareKernel compares the running ones with cgroups, processes and namespaces.
func (w *world) compareKernel(k known) error {
	var errs []error
	for h, list := range groups(w.nodeGroup()) {
		have := map[string]bool{}
		for _, g := range list {
			if containerID.MatchString(g) {
				have[g] = true
			}
		}
		errs = append(errs, same("cgroups of "+h, have, k.running))
	}
	have := map[string]bool{}
	for pid, g := range processes(w.nodeGroup()) {
		id, _, _ := strings.Cut(g, "/")
		switch {
		case containerID.MatchString(id):
			have[id] = true
		case !strings.HasPrefix(g, "daemon"):
			errs = append(errs, fmt.Errorf("process %d is in the group %q, which is no container's", pid, g))
		}
	}
	errs = append(errs, same("containers with processes", have, k.running))
	list, err := os.ReadDir(filepath.Join(filepath.Dir(w.node.Socket), "netns"))
	if err != nil {
		return errors.Join(append(errs, err)...)
	}
	files := map[string]bool{}
	for _, f := range list {
		if containerID.MatchString(f.Name()) {
			files[f.Name()] = true
		}
	}
	return errors.Join(append(errs, same("network namespaces", files, k.sandboxed))...)
}

// same tells how two sets differ.
func same(what string, have, want map[string]bool) error {
	var more, less []string
	for id := range have {
		if !want[id] {
			more = append(more, fmt.Sprintf("%.12s", id))
		}
	}
	for id := range want {
		if !have[id] {
			less = append(less, fmt.Sprintf("%.12s", id))
		}
	}
	if len(more)+len(less) == 0 {
		return nil
	}
	slices.Sort(more)
	slices.Sort(less)
	return fmt.Errorf("%s: unknown to the engine %v, missing %v", what, more, less)
}
