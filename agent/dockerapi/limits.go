package dockerapi

import (
	"context"
	"encoding/json"
	"net/http"

	"github.com/moby/moby/api/types/container"
)

// Limits measures containers and changes what they may use.
type Limits interface {
	// ContainerStats emits one measurement, or one a second until ctx is done or the container is removed. oneShot takes a single look;
	// otherwise the first has an earlier one to compare with.
	ContainerStats(ctx context.Context, ref string, stream, oneShot bool, emit func(container.StatsResponse) error) error
	ContainerUpdate(ctx context.Context, ref string, req container.UpdateConfig) (container.UpdateResponse, error)
}

func (h *handlers) limitRoutes() []route {
	if h.Limits == nil {
		return nil
	}
	return []route{
		{"GET /containers/{id}/stats", h.containerStats},
		{"POST /containers/{id}/update", h.containerUpdate},
	}
}

func (h *handlers) containerStats(w http.ResponseWriter, r *http.Request) error {
	ref, err := pathRef(r, "id")
	if err != nil {
		return err
	}
	q := r.URL.Query()
	stream := !q.Has("stream") || boolQuery(q, "stream")
	oneShot := boolQuery(q, "one-shot")
	if stream && oneShot {
		return invalid("cannot have stream=true and one-shot=true")
	}
	enc := json.NewEncoder(w)
	return h.Limits.ContainerStats(r.Context(), ref, stream, oneShot, func(s container.StatsResponse) error {
		if !began(w) {
			w.Header().Set("Content-Type", "application/json")
		}
		if err := enc.Encode(s); err != nil {
			return err
		}
		return http.NewResponseController(w).Flush()
	})
}

func (h *handlers) containerUpdate(w http.ResponseWriter, r *http.Request) error {
	ref, err := pathRef(r, "id")
	if err != nil {
		return err
	}
	var req container.UpdateConfig
	if err := readJSON(w, r, &req); err != nil {
		return err
	}
	rep, err := h.Limits.ContainerUpdate(r.Context(), ref, req)
	if err != nil {
		return err
	}
	if rep.Warnings == nil {
		rep.Warnings = []string{}
	}
	return writeJSON(w, http.StatusOK, rep)
}
