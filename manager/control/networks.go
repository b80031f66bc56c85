package control

import (
	"context"
	"regexp"
	"strconv"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/network"

	"skein/manager/api"
	"skein/manager/dispatcher"
	"skein/manager/store"
)

const (
	driverOverlay = "overlay"
	scopeSwarm    = "swarm"
	optMTU        = "com.docker.network.driver.mtu"
	optVNI        = "com.docker.network.driver.overlay.vxlanid_list"
	minMTU        = 576
)

var networkName = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]*$`)

// CreateNetwork stores a new overlay network.
func (s *Server) CreateNetwork(ctx context.Context, r *api.CreateRequest) (*api.Created, error) {
	var req network.CreateRequest
	if err := decode("network spec", r.SpecJson, &req); err != nil {
		return nil, err
	}
	rec, err := networkRecord(&req)
	if err != nil {
		return nil, err
	}
	rec.Id = api.NewID()
	if rec.SpecJson, err = encode(req); err != nil {
		return nil, err
	}
	facts := s.facts(ctx, true)
	err = s.write(ctx, func(tx store.WriteTx) error {
		if tx.NetworkByName(rec.Name) != nil {
			return api.Errorf(errdefs.ErrAlreadyExists, "network with name %s already exists", rec.Name)
		}
		if err := onlyIngress(tx, rec); err != nil {
			return err
		}
		if err := mayEncrypt(tx, rec); err != nil {
			return err
		}
		if err := mayHave(tx, rec); err != nil {
			return err
		}
		if err := checkRoutes(tx.Cluster(), rec, facts); err != nil {
			return err
		}
		if tx.Cluster().GetFeatureLevel() >= api.LevelNetworks {
			rec.PathMtu = dispatcher.FitsBetween(facts)
		}
		tx.Add(expect("network", rec.Id, 0))
		tx.Add(&api.Change{Kind: &api.Change_PutNetwork{PutNetwork: rec}})
		return nil
	})
	if err != nil {
		return nil, err
	}
	s.log.Info("network created", "network", rec.Id, "name", rec.Name)
	return &api.Created{Id: rec.Id, Warnings: networkWarnings(rec, req.IPAM != nil && len(req.IPAM.Config) > 0)}, nil
}

// networkRecord checks a request and takes from it what the store keeps apart.
func networkRecord(req *network.CreateRequest) (*api.NetworkRecord, error) {
	a, name := at{object: "network spec"}, req.Name
	switch {
	case len(name) > maxNameLength || !networkName.MatchString(name):
		return nil, a.field("Name").bad(name, "invalid network name: want 1 to %d letters, digits, _ . - and a letter or digit first", maxNameLength)
	case req.Driver != "" && req.Driver != driverOverlay:
		return nil, a.field("Driver").bad(req.Driver, "the driver is not for networks of the cluster: use overlay")
	case req.Scope != "" && req.Scope != scopeSwarm:
		return nil, a.field("Scope").bad(req.Scope, "the scope is not that of an overlay network: use swarm, or none")
	case req.ConfigOnly:
		return nil, a.field("ConfigOnly").unbuilt(true, "config-only networks")
	case req.ConfigFrom != nil && req.ConfigFrom.Network != "":
		return nil, a.field("ConfigFrom.Network").unbuilt(req.ConfigFrom.Network, "config-only networks")
	case req.EnableIPv4 != nil && !*req.EnableIPv4:
		return nil, a.field("EnableIPv4").unbuilt(false, "networks without IPv4")
	}
	if err := checkIngress(a, req); err != nil {
		return nil, err
	}
	if err := validateOptions(a.field("Labels"), onNetwork, req.Labels); err != nil {
		return nil, err
	}
	rec := &api.NetworkRecord{Name: name, Driver: driverOverlay, Internal: req.Internal, Attachable: req.Attachable, Ingress: req.Ingress, Labels: req.Labels}
	if err := networkPools(a.field("IPAM"), req, rec); err != nil {
		return nil, err
	}
	return rec, setOptions(a.field("Options"), req, rec)
}

func setOptions(a at, req *network.CreateRequest, rec *api.NetworkRecord) error {
	for _, k := range sortedKeys(req.Options) {
		a, v := a.key(k), req.Options[k]
		switch k {
		case optMTU:
			n, err := strconv.ParseUint(v, 10, 16)
			if err != nil || n < minMTU {
				return a.bad(v, "want %d to 65535", minMTU)
			}
			rec.Mtu = uint32(n)
		case optVNI:
			n, err := strconv.ParseUint(v, 10, 24)
			if err != nil || n == 0 {
				return a.bad(v, "want one VNI, 1 to 16777215")
			}
			rec.Vni = uint32(n)
		case optEncrypted:
			on, err := encryptedOption(a, v)
			if err != nil {
				return err
			}
			rec.Encrypted = on
		default:
			return a.unbuilt(v, "this option of an overlay network")
		}
	}
	return nil
}

// RemoveNetwork removes a network that nothing uses.
func (s *Server) RemoveNetwork(ctx context.Context, r *api.RemoveRequest) (*api.Empty, error) {
	var name string
	err := s.write(ctx, func(tx store.WriteTx) error {
		n, err := tx.FindNetwork(r.Ref)
		if err != nil {
			return err
		}
		name = n.Name
		if err := ingressUsers(tx, n); err != nil {
			return err
		}
		if users := tx.ServicesUsing(n.Id); len(users) > 0 {
			return api.Errorf(errdefs.ErrFailedPrecondition, "network %s is in use by service %s: remove the service, or detach it first", n.Name, users[0].Name)
		}
		tx.Add(&api.Change{Kind: &api.Change_DeleteNetwork{DeleteNetwork: n.Id}})
		return nil
	})
	if err != nil {
		return nil, err
	}
	s.log.Info("network removed", "name", name)
	return &api.Empty{}, nil
}

// GetNetwork shows one overlay network.
func (s *Server) GetNetwork(ctx context.Context, r *api.GetRequest) (*api.Object, error) {
	var out network.Inspect
	err := s.read(ctx, func(tx store.ReadTx) error {
		n, err := tx.FindNetwork(r.Ref)
		if err != nil {
			return err
		}
		out = networkObject(n)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return object(out)
}

// ListNetworks shows the overlay networks that match all filters.
func (s *Server) ListNetworks(ctx context.Context, r *api.ListRequest) (*api.Objects, error) {
	f, err := newFilters(r.Filters, "id", "name", "label", "driver", "scope", "type", "dangling")
	if err != nil {
		return nil, err
	}
	if err := f.oneOf("type", "custom", "builtin"); err != nil {
		return nil, err
	}
	p := newPage(r.After, r.PageBytes)
	err = s.read(ctx, func(tx store.ReadTx) error {
		for _, n := range behind(tx.Networks(), r.After, func(n *store.Network) string { return n.Id }) {
			kind := "custom"
			if n.Ingress {
				kind = "builtin"
			}
			used := n.Ingress || len(tx.ServicesUsing(n.Id)) > 0
			if f.prefix("id", n.Id) && f.substring("name", n.Name) && f.labels("label", n.Labels) && f.exact("driver", n.Driver) &&
				f.exact("scope", scopeSwarm) && f.exact("type", kind) && f.match("dangling", func(w string) bool { return (w == "true" || w == "1") != used }) {
				if p.full() {
					return nil
				}
				if err := p.add(n.Id, networkObject(n)); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return p.out, nil
}

func networkObject(n *store.Network) network.Inspect {
	var o network.Inspect
	o.Name, o.ID, o.Created, o.Scope, o.Driver, o.EnableIPv4 = n.Name, n.Id, instant(n.Meta.GetCreated()), scopeSwarm, n.Driver, true
	o.Internal, o.Attachable, o.Ingress = n.Internal, n.Attachable, n.Ingress
	o.IPAM.Driver = "default"
	o.IPAM.Config, o.EnableIPv6 = ipamConfig(n), n.Subnet6 != ""
	o.Options = networkOptions(n)
	o.Labels = n.Labels
	if o.Labels == nil {
		o.Labels = map[string]string{}
	}
	return o
}

func networkOptions(n *store.Network) map[string]string {
	out := map[string]string{optVNI: strconv.FormatUint(uint64(n.Vni), 10)}
	if mtu := n.EffectiveMTU(); mtu != 0 {
		out[optMTU] = strconv.Itoa(mtu)
	}
	addEncrypted(n, out)
	return out
}
