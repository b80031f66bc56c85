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

// diskUsage answers docker system df. Volumes and build cache there are none; layers that images share count with each of them.
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
	images, containers, err := h.usedObjects(r.Context())
	if err != nil {
		return err
	}
	if apiMinor(r) < totalsMinor {
		return writeJSON(w, http.StatusOK, usageLists(images, containers, want))
	}
	return writeJSON(w, http.StatusOK, usageTotals(images, containers, want, boolQuery(q, "verbose")))
}

// usedObjects are all images, each with the number of its containers, and all containers with their sizes.
func (h *handlers) usedObjects(ctx context.Context) ([]image.Summary, []container.Summary, error) {
	images, err := h.Images.ImageList(ctx, false, Filters{})
	if err != nil {
		return nil, nil, err
	}
	containers, err := h.Containers.ContainerList(ctx, ListOptions{All: true, Size: true})
	if err != nil {
		return nil, nil, err
	}
	users := map[string]int64{}
	for _, c := range containers {
		users[c.ImageID]++
	}
	images = slices.Clone(images)
	for i := range images {
		images[i].Containers, images[i].SharedSize = users[images[i].ID], 0
	}
	return images, containers, nil
}

func usageLists(images []image.Summary, containers []container.Summary, want func(system.DiskUsageObject) bool) legacyUsage {
	var u legacyUsage
	if want(system.ImageObject) {
		u.Images = append([]image.Summary{}, images...)
		for _, i := range images {
			u.LayersSize += i.Size
		}
	}
	if want(system.ContainerObject) {
		u.Containers = append([]container.Summary{}, containers...)
	}
	if want(system.VolumeObject) {
		u.Volumes = []volume.Volume{}
	}
	if want(system.BuildCacheObject) {
		u.BuildCache = []build.CacheRecord{}
	}
	return u
}

func usageTotals(images []image.Summary, containers []container.Summary, want func(system.DiskUsageObject) bool, verbose bool) system.DiskUsage {
	var u system.DiskUsage
	if want(system.ImageObject) {
		u.ImageUsage = &image.DiskUsage{TotalCount: int64(len(images))}
		for _, i := range images {
			u.ImageUsage.TotalSize += i.Size
			if i.Containers > 0 {
				u.ImageUsage.ActiveCount++
			} else {
				u.ImageUsage.Reclaimable += i.Size
			}
		}
		if verbose {
			u.ImageUsage.Items = images
		}
	}
	if want(system.ContainerObject) {
		u.ContainerUsage = &container.DiskUsage{TotalCount: int64(len(containers))}
		for _, c := range containers {
			u.ContainerUsage.TotalSize += c.SizeRw
			switch c.State {
			case container.StateRunning, container.StatePaused, container.StateRestarting:
				u.ContainerUsage.ActiveCount++
			default:
				u.ContainerUsage.Reclaimable += c.SizeRw
			}
		}
		if verbose {
			u.ContainerUsage.Items = containers
		}
	}
	if want(system.VolumeObject) {
		u.VolumeUsage = &volume.DiskUsage{}
	}
	if want(system.BuildCacheObject) {
		u.BuildCacheUsage = &build.DiskUsage{}
	}
	return u
}
