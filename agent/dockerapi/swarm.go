package dockerapi

import (
	"context"
	"encoding/json"
	"net/http"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
)

func (h *handlers) swarmRoutes() []route {
	return []route{
		{"GET /swarm", h.swarmInspect},
		{"POST /swarm/init", h.swarmInit},
		{"POST /swarm/join", h.swarmJoin},
		{"POST /swarm/leave", h.swarmLeave},
		{"POST /swarm/update", h.swarmUpdate},
		{"GET /swarm/unlockkey", h.swarmUnlockKey},
		{"POST /swarm/unlock", h.swarmUnlock},
	}
}

// control returns the client of the cluster's control service, or docker's text for a node that has none.
func (h *handlers) control(ctx context.Context) (api.ControlClient, error) {
	info := h.Swarm.SwarmInfo(ctx)
	switch {
	case info.ControlAvailable:
	case info.LocalNodeState == "" || info.LocalNodeState == swarm.LocalNodeStateInactive:
		return nil, ErrNoSwarm
	case info.LocalNodeState == swarm.LocalNodeStateActive:
		return nil, ErrNotManager
	}
	return h.Swarm.Control(ctx)
}

func (h *handlers) swarmInspect(w http.ResponseWriter, r *http.Request) error {
	ctl, err := h.control(r.Context())
	if err != nil {
		return err
	}
	obj, err := ctl.GetCluster(r.Context(), &api.GetRequest{})
	if err != nil {
		return err
	}
	return writeRaw(w, obj.GetJson())
}

// swarmUnlockKey shows the key; it is empty while managers are not locked.
func (h *handlers) swarmUnlockKey(w http.ResponseWriter, r *http.Request) error {
	ctl, err := h.control(r.Context())
	if err != nil {
		return err
	}
	key, err := ctl.GetUnlockKey(r.Context(), &api.Empty{})
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, map[string]string{"UnlockKey": key.GetText()})
}

func (h *handlers) swarmUnlock(w http.ResponseWriter, r *http.Request) error {
	var req swarm.UnlockRequest
	if err := readJSON(w, r, &req); err != nil {
		return err
	}
	return h.Swarm.SwarmUnlock(r.Context(), req.UnlockKey)
}

func (h *handlers) swarmInit(w http.ResponseWriter, r *http.Request) error {
	var req swarm.InitRequest
	if err := readJSON(w, r, &req); err != nil {
		return err
	}
	id, err := h.Swarm.SwarmInit(r.Context(), req)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, id)
}

func (h *handlers) swarmJoin(w http.ResponseWriter, r *http.Request) error {
	var req swarm.JoinRequest
	if err := readJSON(w, r, &req); err != nil {
		return err
	}
	if len(req.RemoteAddrs) == 0 {
		return invalid("at least 1 RemoteAddr is required to join")
	}
	if req.JoinToken == "" {
		return invalid("a join token is required to join: ask a manager for one with \"skein swarm join-token worker\"")
	}
	return h.Swarm.SwarmJoin(r.Context(), req)
}

func (h *handlers) swarmLeave(_ http.ResponseWriter, r *http.Request) error {
	return h.Swarm.SwarmLeave(r.Context(), boolQuery(r.URL.Query(), "force"))
}

func (h *handlers) swarmUpdate(w http.ResponseWriter, r *http.Request) error {
	raw, err := readBody(w, r)
	if err != nil {
		return err
	}
	if err := checkObject(raw); err != nil {
		return err
	}
	q := r.URL.Query()
	version, err := versionQuery(r, "swarm")
	if err != nil {
		return err
	}
	ctl, err := h.control(r.Context())
	if err != nil {
		return err
	}
	_, err = ctl.UpdateCluster(r.Context(), &api.UpdateRequest{
		Version: version, SpecJson: withoutParameters(raw),
		RotateWorkerToken: boolQuery(q, "rotateWorkerToken"), RotateManagerToken: boolQuery(q, "rotateManagerToken"),
		RotateUnlockKey: boolQuery(q, "rotateManagerUnlockKey"),
	})
	return err
}

// versionQuery reads the version that an update is based on.
func versionQuery(r *http.Request, object string) (uint64, error) {
	n, err := uintQuery(r.URL.Query(), "version", 64)
	if err != nil {
		return 0, invalid("invalid %s version '%s': the version of the object that the update is based on is required", object, r.URL.Query().Get("version"))
	}
	return n, nil
}

func (h *handlers) nodeRoutes() []route {
	return []route{
		{"GET /nodes", h.nodeList},
		{"GET /nodes/{id}", h.nodeInspect},
		{"POST /nodes/{id}/update", h.nodeUpdate},
		{"DELETE /nodes/{id}", h.nodeRemove},
	}
}

func (h *handlers) nodeList(w http.ResponseWriter, r *http.Request) error {
	f, err := filtersQuery(r.URL.Query(), "id", "label", "membership", "name", "node.label", "role")
	if err != nil {
		return err
	}
	ctl, err := h.control(r.Context())
	if err != nil {
		return err
	}
	return writeList(r.Context(), w, listRequest(f, false), lists(ctl.ListNodes))
}

func listRequest(f Filters, status bool) *api.ListRequest {
	req := &api.ListRequest{Status: status, Filters: make(map[string]*api.StringList, len(f))}
	for k, v := range f {
		req.Filters[k] = &api.StringList{Values: v}
	}
	return req
}

// nodeRef resolves docker's word for this node.
func (h *handlers) nodeRef(ctx context.Context, ref string) string {
	if ref == "self" {
		if id := h.Swarm.SwarmInfo(ctx).NodeID; id != "" {
			return id
		}
	}
	return ref
}

// onObject resolves the control client and the object in the path.
func (h *handlers) onObject(r *http.Request) (api.ControlClient, string, error) {
	ref, err := pathRef(r, "id")
	if err != nil {
		return nil, "", err
	}
	ctl, err := h.control(r.Context())
	return ctl, ref, err
}

func (h *handlers) nodeInspect(w http.ResponseWriter, r *http.Request) error {
	ctl, ref, err := h.onObject(r)
	if err != nil {
		return err
	}
	obj, err := ctl.GetNode(r.Context(), &api.GetRequest{Ref: h.nodeRef(r.Context(), ref)})
	if err != nil {
		return err
	}
	return writeRaw(w, obj.GetJson())
}

func (h *handlers) nodeUpdate(w http.ResponseWriter, r *http.Request) error {
	ctl, ref, err := h.onObject(r)
	if err != nil {
		return err
	}
	raw, err := readBody(w, r)
	if err != nil {
		return err
	}
	if err := checkObject(raw); err != nil {
		return err
	}
	version, err := versionQuery(r, "node")
	if err != nil {
		return err
	}
	_, err = ctl.UpdateNode(r.Context(), &api.UpdateRequest{
		Ref: h.nodeRef(r.Context(), ref), Version: version, SpecJson: withoutParameters(raw),
	})
	return err
}

func (h *handlers) nodeRemove(_ http.ResponseWriter, r *http.Request) error {
	ctl, ref, err := h.onObject(r)
	if err != nil {
		return err
	}
	_, err = ctl.RemoveNode(r.Context(), &api.RemoveRequest{Ref: h.nodeRef(r.Context(), ref), Force: boolQuery(r.URL.Query(), "force")})
	return err
}

// decodeObject reads an object that came over the control service.
func decodeObject(raw []byte, v any, what string) error {
	if err := json.Unmarshal(raw, v); err != nil {
		return api.Errorf(errdefs.ErrInternal, "the manager's answer for %s cannot be read: %v", what, err)
	}
	return nil
}
