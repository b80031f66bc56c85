package dockerapi

import (
	"context"
	"encoding/json"
	"maps"
	"net/http"
	"strings"
	"time"

	"github.com/moby/moby/api/types"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/api/types/system"

	"skein/manager/api"
)

// infoTimeout bounds what /info asks the managers: it must answer without a quorum too.
const infoTimeout = 2 * time.Second

func (h *handlers) systemRoutes() []route {
	return []route{
		{"GET /_ping", h.ping}, // net/http serves HEAD by it
		{"GET /version", h.version},
		{"GET /info", h.info},
		{"GET /events", h.events},
		{"GET /system/df", h.diskUsage},
	}
}

// ping is how clients find out which API, which builder, and whether there is a cluster.
func (h *handlers) ping(w http.ResponseWriter, r *http.Request) error {
	hd := w.Header()
	hd.Set("Cache-Control", "no-cache, no-store, must-revalidate")
	hd.Set("Pragma", "no-cache")
	hd.Set("Builder-Version", "1")
	hd.Set("Swarm", swarmHeader(h.Swarm.SwarmInfo(r.Context())))
	hd.Set("Content-Type", "text/plain; charset=utf-8")
	if r.Method == http.MethodHead {
		hd.Set("Content-Length", "0")
		return nil
	}
	_, err := w.Write([]byte("OK"))
	return err
}

func swarmHeader(s swarm.Info) string {
	switch {
	case s.LocalNodeState == "":
		return string(swarm.LocalNodeStateInactive)
	case s.LocalNodeState != swarm.LocalNodeStateActive:
		return string(s.LocalNodeState)
	case s.ControlAvailable:
		return "active/manager"
	}
	return "active/worker"
}

func (h *handlers) version(w http.ResponseWriter, r *http.Request) error {
	v, err := h.System.Version(r.Context())
	if err != nil {
		return err
	}
	v.APIVersion, v.MinAPIVersion = MaxAPIVersion, MinAPIVersion
	for i, c := range v.Components {
		if c.Name == "Engine" {
			v.Components[i].Details = engineDetails(v, c.Details)
		}
	}
	return writeJSON(w, http.StatusOK, v)
}

// engineDetails completes what clients print of the engine; what the backend said stands, except for the API's versions.
func engineDetails(v system.VersionResponse, said map[string]string) map[string]string {
	d := map[string]string{
		"Os": v.Os, "Arch": v.Arch, "GitCommit": v.GitCommit, "GoVersion": v.GoVersion, "KernelVersion": v.KernelVersion, "BuildTime": v.BuildTime,
		"Experimental": "false",
	}
	maps.Copy(d, said)
	d["ApiVersion"], d["MinAPIVersion"] = MaxAPIVersion, MinAPIVersion
	return d
}

func (h *handlers) info(w http.ResponseWriter, r *http.Request) error {
	info, err := h.System.Info(r.Context())
	if err != nil {
		return err
	}
	info.Swarm = h.Swarm.SwarmInfo(r.Context())
	if info.Swarm.LocalNodeState == "" {
		info.Swarm.LocalNodeState = swarm.LocalNodeStateInactive
	}
	if info.Swarm.ControlAvailable {
		h.addCluster(r.Context(), &info.Swarm)
	}
	return writeJSON(w, http.StatusOK, info)
}

// addCluster completes a manager's swarm info with what only the cluster's store knows; trouble stands in Error, as in docker.
func (h *handlers) addCluster(ctx context.Context, s *swarm.Info) {
	ctx, cancel := context.WithTimeout(ctx, infoTimeout)
	defer cancel()
	err := func() error {
		ctl, err := h.control(ctx)
		if err != nil {
			return err
		}
		if s.Cluster == nil {
			obj, err := ctl.GetCluster(ctx, &api.GetRequest{})
			if err != nil {
				return err
			}
			var c swarm.ClusterInfo // without the join tokens
			if err := json.Unmarshal(obj.GetJson(), &c); err != nil {
				return err
			}
			s.Cluster = &c
		}
		if s.Nodes != 0 {
			return nil
		}
		return api.EachPage(ctx, &api.ListRequest{}, lists(ctl.ListNodes), func(nodes [][]byte) error {
			for _, raw := range nodes {
				var n struct{ Spec struct{ Role swarm.NodeRole } }
				if err := json.Unmarshal(raw, &n); err != nil {
					return err
				}
				s.Nodes++
				if n.Spec.Role == swarm.NodeRoleManager {
					s.Managers++
				}
			}
			return nil
		})
	}()
	if err != nil && s.Error == "" {
		_, s.Error = statusOf(err)
	}
}

var eventFilters = []string{
	"config", "container", "daemon", "event", "image", "label", "network", "node", "plugin", "scope", "secret", "service", "type", "volume",
}

// events streams until the client goes or the end of the asked time is reached. Headers go out at once.
func (h *handlers) events(w http.ResponseWriter, r *http.Request) error {
	q := r.URL.Query()
	f, err := filtersQuery(q, eventFilters...)
	if err != nil {
		return err
	}
	since, err := timeQuery(q, "since")
	if err != nil {
		return err
	}
	until, err := timeQuery(q, "until")
	if err != nil {
		return err
	}
	if !since.IsZero() && !until.IsZero() && since.After(until) {
		return invalid("`since` time (%s) cannot be after `until` time (%s)", q.Get("since"), q.Get("until"))
	}
	ctx, cancel := context.WithCancel(r.Context()) // ends the backend's stream when a write fails
	defer cancel()
	ch, err := h.System.Events(ctx, since, until, f)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", eventsType(r))
	w.WriteHeader(http.StatusOK)
	return streamEvents(ctx, w, ch)
}

// streamEvents writes events until the backend closes the channel: that is how it says that the time is up and all before it was told.
func streamEvents(ctx context.Context, w http.ResponseWriter, ch <-chan events.Message) error {
	rc := http.NewResponseController(w)
	if err := rc.Flush(); err != nil {
		return err
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case e, ok := <-ch:
			if !ok {
				return nil
			}
			if err := encodeJSON(w, e); err != nil {
				return err
			}
			if err := rc.Flush(); err != nil {
				return err
			}
		}
	}
}

// eventsType chooses among the names of one format: JSON documents, one a line.
func eventsType(r *http.Request) string {
	accept := strings.Join(r.Header.Values("Accept"), ",")
	for _, t := range []string{types.MediaTypeJSONLines, types.MediaTypeNDJSON} {
		if strings.Contains(accept, t) {
			return t
		}
	}
	return types.MediaTypeJSON
}
