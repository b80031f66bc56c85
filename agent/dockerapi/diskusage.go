package dockerapi

import (
	"context"
	"net/http"
	"slices"

	"github.com/moby/moby/api/types/build"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/image"
	"github.com/moby/moby/api/types/system"
	"github.com/moby/moby/api/types/volume"
)

// totalsMinor is the first API version whose disk usage has totals; the ones before have lists only.
const totalsMinor = 52

// legacyUsage is what clients before API 1.52 read.
type legacyUsage struct {
	LayersSize int64
	Images     []image.Summary
	Containers []container.Summary
	Volumes    []volume.Volume
	BuildCache []build.CacheRecord
}

// usage is what diskUsage counts.
type usage struct {
	images     []image.Summary     // each with the number of its containers
	containers []container.Summary // all, with their sizes
	volumes    []volume.Volume     // with UsageData
}

// diskUsage answers docker system df. Build cache there is none; layers that images share count with each of them.
func (h *handlers) diskUsage(w http.ResponseWriter, r *http.Request) error {
	q := r.URL.Query()
	want := func(kind system.DiskUsageObject) bool {
		return len(q["type"]) == 0 || slices.Contains(q["type"], string(kind))
	}
	for _, t := range q["type"] {
		switch system.DiskUsageObject(t) {
		case system.ContainerObject, system.ImageObject, system.VolumeObject, system.BuildCacheObject:
		default:
			return invalid("unknown object type: %s", t)
		}
	}
	u, err := h.used(r.Context(), want)
	if err != nil {
		return err
	}
	if apiMinor(r) < totalsMinor {
		return writeJSON(w, http.StatusOK, u.lists(want))
	}
	return writeJSON(w, http.StatusOK, u.totals(want, boolQuery(q, "verbose")))
}

func (h *handlers) used(ctx context.Context, want func(system.DiskUsageObject) bool) (u usage, err error) {
	if u.containers, err = h.Containers.ContainerList(ctx, ListOptions{All: true, Size: want(system.ContainerObject)}); err != nil {
		return u, err
	}
	if u.images, err = h.Images.ImageList(ctx, false, Filters{}); err != nil {
		return u, err
	}
	users := map[string]int64{}
	for _, c := range u.containers {
		users[c.ImageID]++
	}
	u.images = slices.Clone(u.images)
	for i := range u.images {
		u.images[i].Containers, u.images[i].SharedSize = users[u.images[i].ID], 0
	}
	if h.Volumes != nil && want(system.VolumeObject) {
		u.volumes, err = h.Volumes.VolumesUsage(ctx)
	}
	return u, err
}

func (u usage) lists(want func(system.DiskUsageObject) bool) legacyUsage {
	var l legacyUsage
	if want(system.ImageObject) {
		l.Images = append([]image.Summary{}, u.images...)
		for _, i := range u.images {
			l.LayersSize += i.Size
		}
	}
	if want(system.ContainerObject) {
		l.Containers = append([]container.Summary{}, u.containers...)
	}
	if want(system.VolumeObject) {
		l.Volumes = append([]volume.Volume{}, u.volumes...)
	}
	if want(system.BuildCacheObject) {
		l.BuildCache = []build.CacheRecord{}
	}
	return l
}

func (u usage) totals(want func(system.DiskUsageObject) bool, verbose bool) system.DiskUsage {
	var d system.DiskUsage
	if want(system.ImageObject) {
		d.ImageUsage = u.imageTotals()
		if verbose {
			d.ImageUsage.Items = u.images
		}
	}
	if want(system.ContainerObject) {
		d.ContainerUsage = u.containerTotals()
		if verbose {
			d.ContainerUsage.Items = u.containers
		}
	}
	if want(system.VolumeObject) {
		d.VolumeUsage = u.volumeTotals()
		if verbose {
			d.VolumeUsage.Items = u.volumes
		}
	}
	if want(system.BuildCacheObject) {
		d.BuildCacheUsage = &build.DiskUsage{}
	}
	return d
}

func (u usage) imageTotals() *image.DiskUsage {
	d := &image.DiskUsage{TotalCount: int64(len(u.images))}
	for _, i := range u.images {
		d.TotalSize += i.Size
		if i.Containers > 0 {
			d.ActiveCount++
		} else {
			d.Reclaimable += i.Size
		}
	}
	return d
}

func (u usage) containerTotals() *container.DiskUsage {
	d := &container.DiskUsage{TotalCount: int64(len(u.containers))}
	for _, c := range u.containers {
		d.TotalSize += c.SizeRw
		switch c.State {
		case container.StateRunning, container.StatePaused, container.StateRestarting:
			d.ActiveCount++
		default:
			d.Reclaimable += c.SizeRw
		}
	}
	return d
}

func (u usage) volumeTotals() *volume.DiskUsage {
	d := &volume.DiskUsage{TotalCount: int64(len(u.volumes))}
	for _, v := range u.volumes {
		if v.UsageData == nil || v.UsageData.Size < 0 {
			continue
		}
		d.TotalSize += v.UsageData.Size
		if v.UsageData.RefCount > 0 {
			d.ActiveCount++
		} else {
			d.Reclaimable += v.UsageData.Size
		}
	}
	return d
}
