package dockerapi

import (
	"context"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/network"

	"skein/manager/api"
)

// networkPrune removes the networks that nothing uses: the node's own and, on a manager, the cluster's. One that is in use is left in
// peace; that is for its owner to know, so each is simply tried.
func (h *handlers) networkPrune(w http.ResponseWriter, r *http.Request) error {
	f, err := filtersQuery(r.URL.Query(), "until", "label", "label!")
	if err != nil {
		return err
	}
	var before time.Time
	if v := f["until"]; len(v) > 1 {
		return invalid("more than one until filter specified")
	} else if len(v) == 1 {
		if before, err = ParseUntil(v[0]); err != nil {
			return err
		}
	}
	all, clusterErr, err := h.networks(r.Context())
	if err != nil {
		return err
	}
	if clusterErr != nil {
		return clusterErr
	}
	report := network.PruneReport{NetworksDeleted: []string{}}
	for _, n := range all {
		if builtin(n.Name) || n.Ingress || len(n.Containers) > 0 || !labelsMatch(f["label"], n.Labels) ||
			len(f["label!"]) > 0 && labelsMatch(f["label!"], n.Labels) || !before.IsZero() && !n.Created.Before(before) {
			continue
		}
		switch err := h.removeNetwork(r.Context(), n); {
		case err == nil:
			report.NetworksDeleted = append(report.NetworksDeleted, n.Name)
		case inUse(err): // by a service, or by a container that came meanwhile
		default:
			return err
		}
	}
	return writeJSON(w, http.StatusOK, report)
}

// inUse tells refusals from trouble. Not found: somebody else was faster.
func inUse(err error) bool {
	if _, text := statusOf(err); strings.Contains(text, "in use") {
		return true
	}
	kind := api.FromGRPC(err)
	return errdefs.IsPermissionDenied(kind) || errdefs.IsConflict(kind) || errdefs.IsFailedPrecondition(kind) || errdefs.IsNotFound(kind)
}

func (h *handlers) removeNetwork(ctx context.Context, n network.Inspect) error {
	if n.Scope != scopeSwarm {
		return h.Networks.NetworkRemove(ctx, n.ID)
	}
	ctl, err := h.control(ctx)
	if err != nil {
		return err
	}
	_, err = ctl.RemoveNetwork(ctx, &api.RemoveRequest{Ref: n.ID})
	return err
}

// ParseUntil reads the filter until: a point in time, in local time where it names no zone, or how long it is ago ("24h").
func ParseUntil(v string) (time.Time, error) {
	if ago, err := time.ParseDuration(v); err == nil {
		return time.Now().Add(-ago), nil
	}
	for _, layout := range []string{"2006-01-02", "2006-01-02T15", "2006-01-02T15:04", "2006-01-02T15:04:05"} {
		if t, err := time.ParseInLocation(layout, v, time.Local); err == nil {
			return t, nil
		}
	}
	return timeQuery(url.Values{"until": {v}}, "until")
}
