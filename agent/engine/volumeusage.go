package engine

import (
	"context"

	"github.com/moby/moby/api/types/volume"
)

// VolumesUsage lists all volumes with their sizes and how many containers have them.
func (e *Engine) VolumesUsage(ctx context.Context) ([]volume.Volume, error) {
	out := []volume.Volume{}
	for _, v := range e.volumes.List() {
		if err := ctx.Err(); err != nil { // a size costs a walk
			return nil, err
		}
		a := e.apiVolume(v)
		a.UsageData = &volume.UsageData{RefCount: int64(len(e.volumeUsers(v.Name))), Size: e.volumes.Size(v.Name)}
		out = append(out, a)
	}
	return out, nil
}
