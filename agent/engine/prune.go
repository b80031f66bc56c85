package engine

import (
	"context"
	"slices"
	"time"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/image"

	"skein/agent/dockerapi"
)

// pruneFilter says what a prune leaves alone.
type pruneFilter struct {
	before time.Time // what was made later stays; zero: nothing does for that reason
	labels []string  // what lacks one of these stays
	not    []string  // what has one of these stays
}

func pruneFilters(f dockerapi.Filters) (p pruneFilter, err error) {
	p = pruneFilter{labels: f["label"], not: f["label!"]}
	switch until := f["until"]; {
	case len(until) > 1:
		return p, invalid("more than one until filter specified")
	case len(until) == 1:
		p.before, err = dockerapi.ParseUntil(until[0])
	}
	return p, err
}

func (p pruneFilter) keeps(labels map[string]string, created time.Time) bool {
	match := func(l string) bool { return labelMatches(labels, l) }
	return !p.before.IsZero() && created.After(p.before) || slices.ContainsFunc(p.not, match) ||
		slices.ContainsFunc(p.labels, func(l string) bool { return !match(l) })
}

// ContainerPrune removes containers that do not run, but for tasks.
func (e *Engine) ContainerPrune(ctx context.Context, f dockerapi.Filters) (container.PruneReport, error) {
	rep := container.PruneReport{}
	for k := range f {
		if k != "label" && k != "label!" && k != "until" {
			return rep, invalid("invalid filter '%s'", k)
		}
	}
	p, err := pruneFilters(f)
	if err != nil {
		return rep, err
	}
	for _, c := range e.all() {
		r := c.snapshot()
		if r.State.active() || r.State.Status == container.StateRestarting || r.Task != "" || p.keeps(r.Config.Labels, r.Created) {
			continue
		}
		size := e.sizeRw(ctx, r)
		if err := e.ContainerRemove(ctx, r.ID, false, false); err != nil {
			if cerrdefs.IsConflict(err) || cerrdefs.IsNotFound(err) {
				continue // started or removed meanwhile
			}
			return rep, err
		}
		rep.ContainersDeleted = append(rep.ContainersDeleted, r.ID)
		rep.SpaceReclaimed += uint64(size)
	}
	return rep, nil
}

// ImagePrune removes images without a name, or with dangling=false all, that no container uses.
func (e *Engine) ImagePrune(ctx context.Context, f dockerapi.Filters) (image.PruneReport, error) {
	all := false
	for k, v := range f {
		switch {
		case k == "dangling" && len(v) == 1:
			all = v[0] == "false" || v[0] == "0"
		case k == "label", k == "label!", k == "until":
		default:
			return image.PruneReport{}, invalid("invalid filter '%s'", k)
		}
	}
	p, err := pruneFilters(f)
	if err != nil {
		return image.PruneReport{}, err
	}
	list, err := e.cfg.Images.List(ctx)
	if err != nil {
		return image.PruneReport{}, err
	}
	used := map[string]bool{}
	for _, c := range e.all() {
		used[c.rec.Image] = true
	}
	var rep image.PruneReport
	for _, img := range list {
		if used[img.ID.String()] || len(img.Tags) > 0 && !all || p.keeps(img.Config.Config.Labels, img.Created) {
			continue
		}
		untagged, deleted, err := e.cfg.Images.Remove(ctx, img.ID.String(), true)
		if err != nil {
			return rep, err
		}
		for _, u := range untagged {
			rep.ImagesDeleted = append(rep.ImagesDeleted, image.DeleteResponse{Untagged: u})
		}
		for _, d := range deleted {
			rep.ImagesDeleted = append(rep.ImagesDeleted, image.DeleteResponse{Deleted: d})
		}
		rep.SpaceReclaimed += uint64(img.Size)
	}
	return rep, nil
}
