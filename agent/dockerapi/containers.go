package dockerapi

import (
	"net/http"
	"strings"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
)

var containerFilters = []string{
	"ancestor", "before", "exited", "expose", "health", "id", "is-task", "isolation", "label", "name", "network", "publish", "since", "status",
	"volume",
}

func (h *handlers) containerRoutes() []route {
	return []route{
		{"GET /containers/json", h.containerList},
		{"POST /containers/create", h.containerCreate},
		{"POST /containers/prune", h.containerPrune},
		{"GET /containers/{id}/json", h.containerInspect},
		{"GET /containers/{id}/logs", h.containerLogs},
		{"GET /containers/{id}/top", h.containerTop},
		{"POST /containers/{id}/start", h.containerStart},
		{"POST /containers/{id}/stop", h.containerStop},
		{"POST /containers/{id}/restart", h.containerRestart},
		{"POST /containers/{id}/kill", h.containerKill},
		{"POST /containers/{id}/pause", h.containerPause},
		{"POST /containers/{id}/unpause", h.containerUnpause},
		{"POST /containers/{id}/rename", h.containerRename},
		{"POST /containers/{id}/resize", h.containerResize},
		{"POST /containers/{id}/wait", h.containerWait},
		{"POST /containers/{id}/attach", h.containerAttach},
		{"DELETE /containers/{id}", h.containerRemove},
	}
}

func (h *handlers) containerList(w http.ResponseWriter, r *http.Request) error {
	q := r.URL.Query()
	f, err := filtersQuery(q, containerFilters...)
	if err != nil {
		return err
	}
	o := ListOptions{All: boolQuery(q, "all"), Size: boolQuery(q, "size"), Filters: f}
	limit, err := intQuery(q, "limit")
	if err != nil {
		return err
	}
	if limit != nil {
		o.Limit = *limit
	}
	list, err := h.Containers.ContainerList(r.Context(), o)
	if err != nil {
		return err
	}
	if list == nil {
		list = []container.Summary{}
	}
	return writeJSON(w, http.StatusOK, list)
}

func (h *handlers) containerCreate(w http.ResponseWriter, r *http.Request) error {
	q := r.URL.Query()
	var req container.CreateRequest
	if err := readJSON(w, r, &req); err != nil {
		return err
	}
	if req.Config == nil {
		return invalid("config cannot be empty in order to create a container")
	}
	if req.HostConfig == nil {
		req.HostConfig = &container.HostConfig{}
	}
	if req.NetworkingConfig == nil {
		req.NetworkingConfig = &network.NetworkingConfig{}
	}
	name := strings.TrimPrefix(q.Get("name"), "/")
	if len(name) > maxNameBytes {
		return invalid("invalid container name: longer than %d bytes", maxNameBytes)
	}
	resp, err := h.Containers.ContainerCreate(r.Context(), name, req, q.Get("platform"))
	if err != nil {
		return err
	}
	if resp.Warnings == nil {
		resp.Warnings = []string{}
	}
	return writeJSON(w, http.StatusCreated, resp)
}

func (h *handlers) containerPrune(w http.ResponseWriter, r *http.Request) error {
	f, err := filtersQuery(r.URL.Query(), "until", "label", "label!")
	if err != nil {
		return err
	}
	rep, err := h.Containers.ContainerPrune(r.Context(), f)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, rep)
}

func (h *handlers) containerInspect(w http.ResponseWriter, r *http.Request) error {
	ref, err := pathRef(r, "id")
	if err != nil {
		return err
	}
	c, err := h.Containers.ContainerInspect(r.Context(), ref, boolQuery(r.URL.Query(), "size"))
	if err != nil {
		return err
	}
	if apiMinor(r) < endpointsMinor {
		return writeJSON(w, http.StatusOK, toLegacy(c))
	}
	return writeJSON(w, http.StatusOK, c)
}

// onContainer does one thing to the container in the path and answers 204.
func (h *handlers) onContainer(w http.ResponseWriter, r *http.Request, do func(ref string) error) error {
	ref, err := pathRef(r, "id")
	if err != nil {
		return err
	}
	if err := do(ref); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

func (h *handlers) containerStart(w http.ResponseWriter, r *http.Request) error {
	if r.URL.Query().Get("checkpoint") != "" {
		return notBuilt("starting from a checkpoint is not supported by Skein")
	}
	return h.onContainer(w, r, func(ref string) error { return h.Containers.ContainerStart(r.Context(), ref) })
}

func stopOptions(r *http.Request) (StopOptions, error) {
	t, err := intQuery(r.URL.Query(), "t")
	return StopOptions{Signal: r.URL.Query().Get("signal"), Timeout: t}, err
}

func (h *handlers) containerStop(w http.ResponseWriter, r *http.Request) error {
	o, err := stopOptions(r)
	if err != nil {
		return err
	}
	return h.onContainer(w, r, func(ref string) error { return h.Containers.ContainerStop(r.Context(), ref, o) })
}

func (h *handlers) containerRestart(w http.ResponseWriter, r *http.Request) error {
	o, err := stopOptions(r)
	if err != nil {
		return err
	}
	return h.onContainer(w, r, func(ref string) error { return h.Containers.ContainerRestart(r.Context(), ref, o) })
}

func (h *handlers) containerKill(w http.ResponseWriter, r *http.Request) error {
	return h.onContainer(w, r, func(ref string) error {
		return h.Containers.ContainerKill(r.Context(), ref, r.URL.Query().Get("signal"))
	})
}

func (h *handlers) containerPause(w http.ResponseWriter, r *http.Request) error {
	return h.onContainer(w, r, func(ref string) error { return h.Containers.ContainerPause(r.Context(), ref) })
}

func (h *handlers) containerUnpause(w http.ResponseWriter, r *http.Request) error {
	return h.onContainer(w, r, func(ref string) error { return h.Containers.ContainerUnpause(r.Context(), ref) })
}

func (h *handlers) containerRename(w http.ResponseWriter, r *http.Request) error {
	name := strings.TrimPrefix(r.URL.Query().Get("name"), "/")
	if name == "" || len(name) > maxNameBytes {
		return invalid("Neither old nor new names may be empty")
	}
	return h.onContainer(w, r, func(ref string) error { return h.Containers.ContainerRename(r.Context(), ref, name) })
}

func (h *handlers) containerRemove(w http.ResponseWriter, r *http.Request) error {
	q := r.URL.Query()
	if boolQuery(q, "link") {
		return notBuilt("links between containers are not supported by Skein: put the containers on one network instead")
	}
	return h.onContainer(w, r, func(ref string) error {
		return h.Containers.ContainerRemove(r.Context(), ref, boolQuery(q, "force"), boolQuery(q, "v"))
	})
}

// sizeQuery reads a terminal's size.
func sizeQuery(r *http.Request) (rows, cols uint16, err error) {
	q := r.URL.Query()
	hh, err := uintQuery(q, "h", 16)
	if err != nil {
		return 0, 0, err
	}
	ww, err := uintQuery(q, "w", 16)
	return uint16(hh), uint16(ww), err
}

func (h *handlers) containerResize(w http.ResponseWriter, r *http.Request) error {
	ref, err := pathRef(r, "id")
	if err != nil {
		return err
	}
	rows, cols, err := sizeQuery(r)
	if err != nil {
		return err
	}
	return h.Containers.ContainerResize(r.Context(), ref, rows, cols)
}

func (h *handlers) containerTop(w http.ResponseWriter, r *http.Request) error {
	ref, err := pathRef(r, "id")
	if err != nil {
		return err
	}
	top, err := h.Containers.ContainerTop(r.Context(), ref, strings.Fields(r.URL.Query().Get("ps_args")))
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, top)
}

// containerWait sends its headers at once: docker run opens the wait before it starts the container.
func (h *handlers) containerWait(w http.ResponseWriter, r *http.Request) error {
	ref, err := pathRef(r, "id")
	if err != nil {
		return err
	}
	cond := container.WaitCondition(r.URL.Query().Get("condition"))
	switch cond {
	case "":
		cond = container.WaitConditionNotRunning
	case container.WaitConditionNotRunning, container.WaitConditionNextExit, container.WaitConditionRemoved:
	default:
		return invalid("invalid condition: %q", string(cond))
	}
	ch, err := h.Containers.ContainerWait(r.Context(), ref, cond)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusOK)
	if err := http.NewResponseController(w).Flush(); err != nil {
		return err
	}
	select {
	case <-r.Context().Done():
		return r.Context().Err()
	case resp, ok := <-ch:
		if !ok {
			resp = container.WaitResponse{StatusCode: 125, Error: &container.WaitExitError{Message: "the daemon stopped waiting for the container"}}
		}
		return encodeJSON(w, resp)
	}
}
