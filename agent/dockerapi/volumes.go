package dockerapi

import (
	"context"
	"net/http"

	"github.com/moby/moby/api/types/volume"
)

// Volumes is this node's volumes.
type Volumes interface {
	VolumeCreate(ctx context.Context, req volume.CreateRequest) (volume.Volume, error)
	VolumeInspect(ctx context.Context, name string) (volume.Volume, error)
	VolumeList(ctx context.Context, f Filters) ([]volume.Volume, error)
	VolumeRemove(ctx context.Context, name string, force bool) error
	VolumesUsage(ctx context.Context) ([]volume.Volume, error) // all, with UsageData
	VolumesPrune(ctx context.Context, f Filters) (volume.PruneReport, error)
}

// pruneAllMinor is the first API version in which a prune leaves named volumes alone unless asked for all.
const pruneAllMinor = 42

// volumeRoutes take the place of the refusals in missingRoutes where the node has volumes.
func (h *handlers) volumeRoutes() []route {
	if h.Volumes == nil {
		return nil
	}
	return []route{
		{"GET /volumes", h.volumeList},
		{"POST /volumes/create", h.volumeCreate},
		{"POST /volumes/prune", h.volumesPrune},
		{"GET /volumes/{id}", h.volumeInspect},
		{"DELETE /volumes/{id}", h.volumeRemove},
		{"PUT /volumes/{id}", unbuilt("updating a cluster volume")},
	}
}

func (h *handlers) volumeList(w http.ResponseWriter, r *http.Request) error {
	f, err := filtersQuery(r.URL.Query(), "dangling", "driver", "label", "name")
	if err != nil {
		return err
	}
	list, err := h.Volumes.VolumeList(r.Context(), f)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, volume.ListResponse{Volumes: list, Warnings: []string{}})
}

func (h *handlers) volumeCreate(w http.ResponseWriter, r *http.Request) error {
	var req volume.CreateRequest
	if err := readOptionalJSON(w, r, &req); err != nil {
		return err
	}
	v, err := h.Volumes.VolumeCreate(r.Context(), req)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusCreated, v)
}

func (h *handlers) volumeInspect(w http.ResponseWriter, r *http.Request) error {
	name, err := pathRef(r, "id")
	if err != nil {
		return err
	}
	v, err := h.Volumes.VolumeInspect(r.Context(), name)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, v)
}

func (h *handlers) volumeRemove(w http.ResponseWriter, r *http.Request) error {
	name, err := pathRef(r, "id")
	if err != nil {
		return err
	}
	if err := h.Volumes.VolumeRemove(r.Context(), name, boolQuery(r.URL.Query(), "force")); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

func (h *handlers) volumesPrune(w http.ResponseWriter, r *http.Request) error {
	f, err := filtersQuery(r.URL.Query(), "all", "label", "label!")
	if err != nil {
		return err
	}
	if apiMinor(r) < pruneAllMinor {
		if f == nil {
			f = Filters{}
		}
		f["all"] = []string{"true"}
	}
	rep, err := h.Volumes.VolumesPrune(r.Context(), f)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, rep)
}
