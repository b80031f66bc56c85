package dockerapi

import (
	"context"
	"encoding/json"
	"net/http"
	"strconv"
	"strings"

	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
)

// RollbackRequest asks for a revision of a service to be the current one again.
type RollbackRequest struct {
	To      uint64
	Version uint64 `json:",omitempty"` // of the service it is based on; 0: whatever it is now
}

// serviceRevisions answers GET /skein/services/{id}/revisions?before=&limit=&number=: an array, the newest revision first.
func (h *handlers) serviceRevisions(w http.ResponseWriter, r *http.Request) error {
	ctl, ref, err := h.onObject(r)
	if err != nil {
		return err
	}
	req := &api.RevisionsRequest{Ref: ref}
	q := r.URL.Query()
	number := func(name, text string) uint64 {
		n, e := strconv.ParseUint(text, 10, 64)
		if text != "" && e != nil && err == nil {
			err = invalid("invalid value for %q: %q is not a number", name, text)
		}
		return n
	}
	req.Before = number("before", q.Get("before"))
	req.Limit = uint32(min(number("limit", q.Get("limit")), 1<<31))
	for _, text := range q["number"] {
		for one := range strings.SplitSeq(text, ",") {
			req.Numbers = append(req.Numbers, number("number", one))
		}
	}
	if err != nil {
		return err
	}
	return writeList(r.Context(), w, &api.ListRequest{}, func(ctx context.Context, _ *api.ListRequest) (*api.Objects, error) {
		return ctl.ListRevisions(ctx, req)
	})
}

// serviceRollback answers POST /skein/services/{id}/rollback.
func (h *handlers) serviceRollback(w http.ResponseWriter, r *http.Request) error {
	var req RollbackRequest
	if err := readJSON(w, r, &req); err != nil {
		return err
	}
	ctl, ref, err := h.onObject(r)
	if err != nil {
		return err
	}
	if req.To == 0 {
		return invalid("rollback of service %s: To is missing: it is the number of a revision, as GET /skein/services/%s/revisions lists them", ref, ref)
	}
	if req.Version == 0 {
		obj, err := ctl.GetService(r.Context(), &api.GetRequest{Ref: ref})
		if err != nil {
			return err
		}
		var svc swarm.Service
		if err := json.Unmarshal(obj.GetJson(), &svc); err != nil {
			return err
		}
		ref, req.Version = svc.ID, svc.Version.Index
	}
	reply, err := ctl.UpdateService(r.Context(), &api.UpdateRequest{Ref: ref, Version: req.Version, Rollback: "revision", RollbackTo: req.To})
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, swarm.ServiceUpdateResponse{Warnings: reply.GetWarnings()})
}
