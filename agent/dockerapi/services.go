package dockerapi

import (
	"context"
	"net/http"

	"github.com/moby/moby/api/types/registry"
	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
)

func (h *handlers) serviceRoutes() []route {
	return []route{
		{"GET /services", h.serviceList},
		{"POST /services/create", h.serviceCreate},
		{"GET /services/{id}", h.serviceInspect},
		{"POST /services/{id}/update", h.serviceUpdate},
		{"DELETE /services/{id}", h.serviceRemove},
		{"GET /services/{id}/logs", h.serviceLogs},
	}
}

func (h *handlers) serviceList(w http.ResponseWriter, r *http.Request) error {
	q := r.URL.Query()
	f, err := filtersQuery(q, "id", "label", "mode", "name", "runtime")
	if err != nil {
		return err
	}
	ctl, err := h.control(r.Context())
	if err != nil {
		return err
	}
	return writeList(r.Context(), w, listRequest(f, boolQuery(q, "status")), lists(ctl.ListServices))
}

// readServiceSpec returns the spec as the client sent it, so that nothing of it is lost, once it is known to be one.
func readServiceSpec(w http.ResponseWriter, r *http.Request) ([]byte, error) {
	raw, err := readBody(w, r)
	if err != nil {
		return nil, err
	}
	if len(raw) > api.MaxSpecBytes {
		return nil, invalid("invalid service spec: %d bytes are more than the limit of %d: keep large data in images or configs", len(raw), api.MaxSpecBytes)
	}
	return raw, checkObject(raw)
}

func (h *handlers) serviceCreate(w http.ResponseWriter, r *http.Request) error {
	ctl, err := h.control(r.Context())
	if err != nil {
		return err
	}
	raw, err := readServiceSpec(w, r)
	if err != nil {
		return err
	}
	created, err := ctl.CreateService(r.Context(), &api.CreateRequest{SpecJson: raw, RegistryAuth: r.Header.Get(registry.AuthHeader)})
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusCreated, swarm.ServiceCreateResponse{ID: created.GetId(), Warnings: created.GetWarnings()})
}

func (h *handlers) serviceInspect(w http.ResponseWriter, r *http.Request) error {
	ctl, ref, err := h.onObject(r)
	if err != nil {
		return err
	}
	obj, err := ctl.GetService(r.Context(), &api.GetRequest{Ref: ref, InsertDefaults: boolQuery(r.URL.Query(), "insertDefaults")})
	if err != nil {
		return err
	}
	return writeRaw(w, obj.GetJson())
}

func (h *handlers) serviceUpdate(w http.ResponseWriter, r *http.Request) error {
	ctl, ref, err := h.onObject(r)
	if err != nil {
		return err
	}
	raw, err := readServiceSpec(w, r)
	if err != nil {
		return err
	}
	version, err := versionQuery(r, "service")
	if err != nil {
		return err
	}
	q := r.URL.Query()
	rollback := q.Get("rollback")
	switch rollback {
	case "", "previous":
	case "none": // how newer clients say that they want none
		rollback = ""
	default:
		return invalid("invalid value for \"rollback\": %q, there are \"previous\" and \"none\"", rollback)
	}
	auth := r.Header.Get(registry.AuthHeader)
	authFrom := ""
	switch from := swarm.RegistryAuthSource(q.Get("registryAuthFrom")); from {
	case "", swarm.RegistryAuthFromSpec:
	case swarm.RegistryAuthFromPreviousSpec:
		authFrom = string(from)
	default:
		return invalid("invalid value for \"registryAuthFrom\": %q", string(from))
	}
	upd, err := ctl.UpdateService(r.Context(), &api.UpdateRequest{
		Ref: ref, Version: version, SpecJson: withoutParameters(raw), RegistryAuth: auth, RegistryAuthFrom: authFrom, Rollback: rollback,
	})
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, swarm.ServiceUpdateResponse{Warnings: upd.GetWarnings()})
}

func (h *handlers) serviceRemove(_ http.ResponseWriter, r *http.Request) error {
	ctl, ref, err := h.onObject(r)
	if err != nil {
		return err
	}
	_, err = ctl.RemoveService(r.Context(), &api.RemoveRequest{Ref: ref})
	return err
}

func (h *handlers) taskRoutes() []route {
	return []route{
		{"GET /tasks", h.taskList},
		{"GET /tasks/{id}", h.taskInspect},
		{"GET /tasks/{id}/logs", h.taskLogs},
	}
}

func (h *handlers) taskList(w http.ResponseWriter, r *http.Request) error {
	f, err := filtersQuery(r.URL.Query(), "_up-to-date", "desired-state", "id", "label", "name", "node", "runtime", "service")
	if err != nil {
		return err
	}
	ctl, err := h.control(r.Context())
	if err != nil {
		return err
	}
	if err := h.resolveTaskFilters(r.Context(), ctl, f); err != nil {
		return err
	}
	return writeList(r.Context(), w, listRequest(f, false), lists(ctl.ListTasks))
}

// resolveTaskFilters turns names of services and nodes into ids, as docker does before it asks the managers. Ids pass without a look-up.
func (h *handlers) resolveTaskFilters(ctx context.Context, ctl api.ControlClient, f Filters) error {
	for i, ref := range f["service"] {
		if api.ValidID(ref) {
			continue
		}
		obj, err := ctl.GetService(ctx, &api.GetRequest{Ref: ref})
		if err != nil {
			return err
		}
		if f["service"][i], err = objectID(obj, "service "+ref); err != nil {
			return err
		}
	}
	for i, ref := range f["node"] {
		ref = h.nodeRef(ctx, ref)
		f["node"][i] = ref
		if api.ValidID(ref) {
			continue
		}
		obj, err := ctl.GetNode(ctx, &api.GetRequest{Ref: ref})
		if err != nil {
			return err
		}
		if f["node"][i], err = objectID(obj, "node "+ref); err != nil {
			return err
		}
	}
	return nil
}

func objectID(obj *api.Object, what string) (string, error) {
	var o struct{ ID string }
	err := decodeObject(obj.GetJson(), &o, what)
	return o.ID, err
}

func (h *handlers) taskInspect(w http.ResponseWriter, r *http.Request) error {
	ctl, ref, err := h.onObject(r)
	if err != nil {
		return err
	}
	obj, err := ctl.GetTask(r.Context(), &api.GetRequest{Ref: ref})
	if err != nil {
		return err
	}
	return writeRaw(w, obj.GetJson())
}
