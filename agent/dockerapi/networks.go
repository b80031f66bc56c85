package dockerapi

import (
	"context"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
)

// scopeSwarm and the others are docker's words for how far a network reaches.
const (
	scopeSwarm    = "swarm"
	driverOverlay = "overlay"
)

var networkFilters = []string{"dangling", "driver", "id", "label", "name", "scope", "type"}

func (h *handlers) networkRoutes() []route {
	return []route{
		{"GET /networks", h.networkList},
		{"POST /networks/create", h.networkCreate},
		{"POST /networks/prune", h.networkPrune},
		{"GET /networks/{id}", h.networkInspect},
		{"DELETE /networks/{id}", h.networkRemove},
		{"POST /networks/{id}/connect", h.networkConnect},
		{"POST /networks/{id}/disconnect", h.networkDisconnect},
	}
}

// networksTimeout bounds the question to the managers: the node's own networks are there without a quorum. An election is over by then.
const networksTimeout = 5 * time.Second

// workerTimeout is the same on a worker, which has networks of the cluster to show without an answer, too.
const workerTimeout = 2 * time.Second

// networks returns this node's networks and, on a manager, the cluster's; on a worker those of the cluster that concern it. A network that the
// node knows too is listed once. Without an answer of the managers the node's are returned all the same, and on a manager why in clusterErr.
func (h *handlers) networks(ctx context.Context) (all []network.Inspect, clusterErr, err error) {
	all, err = h.Networks.NetworkList(ctx)
	info := h.Swarm.SwarmInfo(ctx)
	if err != nil || info.LocalNodeState != swarm.LocalNodeStateActive {
		return all, nil, err
	}
	ask, bound := h.clusterNetworks, networksTimeout
	if !info.ControlAvailable {
		ask, bound = h.Swarm.NodeNetworks, workerTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, bound)
	defer cancel()
	cluster, err := ask(ctx)
	if err != nil && !info.ControlAvailable {
		return all, nil, nil
	}
	if err != nil {
		return all, err, nil
	}
	at := make(map[string]int, len(all))
	for i, n := range all {
		at[n.ID] = i
	}
	for _, n := range cluster {
		if i, ok := at[n.ID]; ok {
			n.Containers, n.Peers, n.Services = all[i].Containers, all[i].Peers, all[i].Services // only the node knows these
			all[i] = n
			continue
		}
		all = append(all, n)
	}
	return all, nil, nil
}

func (h *handlers) clusterNetworks(ctx context.Context) ([]network.Inspect, error) {
	ctl, err := h.control(ctx)
	if err != nil {
		return nil, err
	}
	var list []network.Inspect
	err = api.EachPage(ctx, &api.ListRequest{}, lists(ctl.ListNetworks), func(objects [][]byte) error {
		for _, raw := range objects {
			var n network.Inspect
			if err := decodeObject(raw, &n, "a network"); err != nil {
				return err
			}
			list = append(list, n)
		}
		return nil
	})
	return list, err
}

func (h *handlers) networkList(w http.ResponseWriter, r *http.Request) error {
	f, err := filtersQuery(r.URL.Query(), networkFilters...)
	if err != nil {
		return err
	}
	all, clusterErr, err := h.networks(r.Context())
	if err != nil {
		return err
	}
	if clusterErr != nil && !nodeOnly(f) {
		return clusterErr // a list that left out networks would say that they are gone
	}
	keep, err := networkMatcher(f)
	if err != nil {
		return err
	}
	list := make([]network.Summary, 0, len(all))
	for _, n := range all {
		if keep(n) {
			list = append(list, network.Summary{Network: n.Network})
		}
	}
	return writeJSON(w, http.StatusOK, list)
}

// nodeOnly reports whether a filter leaves nothing of the cluster's networks.
func nodeOnly(f Filters) bool {
	excludes := func(key string, cluster ...string) bool {
		return len(f[key]) > 0 && !slices.ContainsFunc(f[key], func(v string) bool { return slices.Contains(cluster, v) })
	}
	return excludes("scope", scopeSwarm) || excludes("driver", driverOverlay) || excludes("type", "custom")
}

// networkMatcher compiles filters. Values of one key are alternatives, labels must all match.
func networkMatcher(f Filters) (func(network.Inspect) bool, error) {
	for _, v := range f["type"] {
		if v != "custom" && v != "builtin" {
			return nil, invalid("invalid filter 'type=%s'", v)
		}
	}
	for _, v := range f["dangling"] {
		if v != "true" && v != "false" && v != "1" && v != "0" {
			return nil, invalid("invalid filter 'dangling=%s'", v)
		}
	}
	oneOf := func(key string, match func(want string) bool) bool {
		return len(f[key]) == 0 || slices.ContainsFunc(f[key], match)
	}
	return func(n network.Inspect) bool {
		return oneOf("driver", func(v string) bool { return n.Driver == v }) &&
			oneOf("scope", func(v string) bool { return n.Scope == v }) &&
			oneOf("name", func(v string) bool { return strings.Contains(n.Name, v) }) &&
			oneOf("id", func(v string) bool { return strings.HasPrefix(n.ID, v) }) &&
			oneOf("type", func(v string) bool { return (v == "builtin") == builtin(n.Name) }) &&
			oneOf("dangling", func(v string) bool {
				unused := len(n.Containers) == 0 && len(n.Services) == 0 && !builtin(n.Name)
				return unused == (v == "true" || v == "1")
			}) && labelsMatch(f["label"], n.Labels)
	}, nil
}

func builtin(name string) bool {
	return name == network.NetworkBridge || name == network.NetworkHost || name == network.NetworkNone
}

// predefined is what the cluster shows of a network that every node has by itself: clients look it up by scope before they put its id into
// a service (docker service create --network host).
func predefined(ref string) (network.Inspect, bool) {
	var n network.Inspect
	if !builtin(ref) {
		return n, false
	}
	n.Name, n.ID, n.Scope, n.Driver, n.EnableIPv4 = ref, ref, scopeSwarm, ref, true
	if ref == network.NetworkNone {
		n.Driver, n.EnableIPv4 = "null", false
	}
	n.IPAM.Driver, n.Options, n.Labels, n.Containers = "default", map[string]string{}, map[string]string{}, map[string]network.EndpointResource{}
	return n, true
}

func labelsMatch(want []string, have map[string]string) bool {
	for _, l := range want {
		k, v, exact := strings.Cut(l, "=")
		got, ok := have[k]
		if !ok || exact && got != v {
			return false
		}
	}
	return true
}

// findNetwork resolves a name, id or unique id prefix; an exact id wins over a name, a name over a prefix.
func (h *handlers) findNetwork(ctx context.Context, ref, scope string) (network.Inspect, error) {
	all, clusterErr, err := h.networks(ctx)
	if err != nil {
		return network.Inspect{}, err
	}
	matches := []func(n network.Inspect) bool{
		func(n network.Inspect) bool { return n.ID == ref },
		func(n network.Inspect) bool { return n.Name == ref },
		func(n network.Inspect) bool { return strings.HasPrefix(n.ID, ref) },
	}
	for i, match := range matches {
		var found []network.Inspect
		for _, n := range all {
			if match(n) && (scope == "" || n.Scope == scope) {
				found = append(found, n)
			}
		}
		switch {
		case len(found) == 1:
			return found[0], nil
		case len(found) > 1 && i == 1:
			return network.Inspect{}, invalid("network %s is ambiguous (%d matches found based on name)", ref, len(found))
		case len(found) > 1:
			return network.Inspect{}, invalid("network %s is ambiguous (%d matches found based on ID prefix)", ref, len(found))
		}
	}
	if clusterErr != nil {
		return network.Inspect{}, clusterErr // it may be one of those that cannot be seen now
	}
	return network.Inspect{}, notFound("network %s not found", ref)
}

func (h *handlers) networkInspect(w http.ResponseWriter, r *http.Request) error {
	ref, err := pathRef(r, "id")
	if err != nil {
		return err
	}
	scope := r.URL.Query().Get("scope")
	if n, ok := predefined(ref); ok && scope == scopeSwarm && h.Swarm.SwarmInfo(r.Context()).ControlAvailable {
		return writeJSON(w, http.StatusOK, n)
	}
	n, err := h.findNetwork(r.Context(), ref, scope)
	if err != nil {
		return err
	}
	if n.Containers == nil {
		n.Containers = map[string]network.EndpointResource{}
	}
	if !boolQuery(r.URL.Query(), "verbose") {
		n.Services = nil
	}
	return writeJSON(w, http.StatusOK, n)
}

func (h *handlers) networkCreate(w http.ResponseWriter, r *http.Request) error {
	raw, err := readBody(w, r)
	if err != nil {
		return err
	}
	var where struct{ Driver, Scope any }
	if err := decodeJSON(raw, &where); err != nil {
		return err
	}
	if where.Driver == driverOverlay || where.Scope == scopeSwarm {
		return h.clusterNetworkCreate(w, r, raw)
	}
	var req network.CreateRequest
	if err := decodeJSON(raw, &req); err != nil {
		return err
	}
	if strings.TrimSpace(req.Name) == "" {
		return invalid("network name is empty")
	}
	resp, err := h.Networks.NetworkCreate(r.Context(), req)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusCreated, resp)
}

// clusterNetworkCreate has the managers make a network. Older clients ask for a check of duplicates, which is always done.
func (h *handlers) clusterNetworkCreate(w http.ResponseWriter, r *http.Request, raw []byte) error {
	ctl, err := h.control(r.Context())
	if err != nil {
		return err
	}
	created, err := ctl.CreateNetwork(r.Context(), &api.CreateRequest{SpecJson: without(raw, "CheckDuplicate")})
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusCreated, network.CreateResponse{ID: created.GetId(), Warning: strings.Join(created.GetWarnings(), "\n")})
}

func (h *handlers) networkRemove(w http.ResponseWriter, r *http.Request) error {
	ref, err := pathRef(r, "id")
	if err != nil {
		return err
	}
	n, err := h.findNetwork(r.Context(), ref, "")
	if err != nil {
		return err
	}
	if n.Scope != scopeSwarm {
		err = h.Networks.NetworkRemove(r.Context(), ref) // its texts name what the user named
	} else if ctl, cerr := h.control(r.Context()); cerr != nil {
		err = cerr
	} else {
		_, err = ctl.RemoveNetwork(r.Context(), &api.RemoveRequest{Ref: n.ID})
	}
	if err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

func (h *handlers) networkConnect(w http.ResponseWriter, r *http.Request) error {
	ref, err := pathRef(r, "id")
	if err != nil {
		return err
	}
	var req network.ConnectRequest
	if err := readJSON(w, r, &req); err != nil {
		return err
	}
	return h.Networks.NetworkConnect(r.Context(), ref, req)
}

func (h *handlers) networkDisconnect(w http.ResponseWriter, r *http.Request) error {
	ref, err := pathRef(r, "id")
	if err != nil {
		return err
	}
	var req network.DisconnectRequest
	if err := readJSON(w, r, &req); err != nil {
		return err
	}
	return h.Networks.NetworkDisconnect(r.Context(), ref, req)
}
