package control

import (
	"context"
	"net/netip"
	"regexp"
	"strconv"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/network"

	"skein/manager/api"
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
	if err := decode("network", r.SpecJson, &req); err != nil {
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
	err = s.write(ctx, func(tx store.WriteTx) error {
		if tx.NetworkByName(rec.Name) != nil {
			return api.Errorf(errdefs.ErrAlreadyExists, "network with name %s already exists", rec.Name)
		}
		tx.Add(expect("network", rec.Id, 0))
		tx.Add(&api.Change{Kind: &api.Change_PutNetwork{PutNetwork: rec}})
		return nil
	})
	if err != nil {
		return nil, err
	}
	s.log.Info("network created", "network", rec.Id, "name", rec.Name)
	return &api.Created{Id: rec.Id}, nil
}

// networkRecord checks a request and takes from it what the store keeps apart.
func networkRecord(req *network.CreateRequest) (*api.NetworkRecord, error) {
	name := req.Name
	switch {
	case len(name) > maxNameLength || !networkName.MatchString(name):
		return nil, invalid("invalid network name %.80q: want 1 to %d letters, digits, _ . - and a letter or digit first", name, maxNameLength)
	case req.Driver != "" && req.Driver != driverOverlay:
		return nil, invalid("network %s: driver %q is not for networks of the cluster: use overlay", name, req.Driver)
	case req.Scope != "" && req.Scope != scopeSwarm:
		return nil, invalid("network %s: scope %q is not that of an overlay network: use swarm, or none", name, req.Scope)
	case req.ConfigOnly || (req.ConfigFrom != nil && req.ConfigFrom.Network != ""):
		return nil, notBuilt("network %s: config-only networks", name)
	case req.Ingress:
		return nil, api.Errorf(errdefs.ErrFailedPrecondition, "network %s: an ingress network exists already: the routing mesh needs no other", name)
	case req.EnableIPv4 != nil && !*req.EnableIPv4:
		return nil, notBuilt("network %s: networks without IPv4", name)
	case req.EnableIPv6 != nil && *req.EnableIPv6:
		return nil, notBuilt("network %s: IPv6", name)
	}
	if err := validateLabels("network "+name, req.Labels); err != nil {
		return nil, err
	}
	rec := &api.NetworkRecord{Name: name, Driver: driverOverlay, Internal: req.Internal, Attachable: req.Attachable, Labels: req.Labels}
	if err := networkPools(req, rec); err != nil {
		return nil, err
	}
	return rec, setOptions(req, rec)
}

func networkPools(req *network.CreateRequest, rec *api.NetworkRecord) error {
	if req.IPAM == nil {
		return nil
	}
	if d := req.IPAM.Driver; d != "" && d != "default" {
		return notBuilt("network %s: IPAM driver %q", req.Name, d)
	}
	if len(req.IPAM.Options) > 0 {
		return notBuilt("network %s: IPAM options", req.Name)
	}
	for _, c := range req.IPAM.Config {
		switch {
		case c.IPRange.IsValid():
			return notBuilt("network %s: IP ranges within a subnet", req.Name)
		case c.Gateway.IsValid():
			return notBuilt("network %s: a gateway of your choice", req.Name)
		case len(c.AuxAddress) > 0:
			return notBuilt("network %s: auxiliary addresses", req.Name)
		case !c.Subnet.IsValid():
			continue
		case !c.Subnet.Addr().Is4():
			return notBuilt("network %s: IPv6 subnets", req.Name)
		case rec.Subnet4 != "":
			return notBuilt("network %s: more than one subnet", req.Name)
		}
		rec.Subnet4 = c.Subnet.String()
	}
	return nil
}

func setOptions(req *network.CreateRequest, rec *api.NetworkRecord) error {
	for k, v := range req.Options {
		switch k {
		case optMTU:
			n, err := strconv.ParseUint(v, 10, 16)
			if err != nil || n < minMTU {
				return invalid("network %s: option %s=%.40q: want %d to 65535", req.Name, k, v, minMTU)
			}
			rec.Mtu = uint32(n)
		case optVNI:
			n, err := strconv.ParseUint(v, 10, 24)
			if err != nil || n == 0 {
				return invalid("network %s: option %s=%.40q: want one VNI, 1 to 16777215", req.Name, k, v)
			}
			rec.Vni = uint32(n)
		case "encrypted":
			return notBuilt("network %s: encrypted overlays", req.Name)
		default:
			return notBuilt("network %s: option %.80q", req.Name, k)
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
		if n.Ingress {
			return api.Errorf(errdefs.ErrFailedPrecondition, "network %s is the routing mesh's and can't be removed", n.Name)
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
	var out []network.Inspect
	err = s.read(ctx, func(tx store.ReadTx) error {
		for _, n := range tx.Networks() {
			kind := "custom"
			if n.Ingress {
				kind = "builtin"
			}
			used := n.Ingress || len(tx.ServicesUsing(n.Id)) > 0
			if f.prefix("id", n.Id) && f.substring("name", n.Name) && f.labels("label", n.Labels) && f.exact("driver", n.Driver) &&
				f.exact("scope", scopeSwarm) && f.exact("type", kind) && f.match("dangling", func(w string) bool { return (w == "true" || w == "1") != used }) {
				out = append(out, networkObject(n))
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return objects(out)
}

func networkObject(n *store.Network) network.Inspect {
	var o network.Inspect
	o.Name, o.ID, o.Created, o.Scope, o.Driver, o.EnableIPv4 = n.Name, n.Id, instant(n.Meta.GetCreated()), scopeSwarm, n.Driver, true
	o.Internal, o.Attachable, o.Ingress = n.Internal, n.Attachable, n.Ingress
	o.IPAM.Driver = "default"
	if p, err := netip.ParsePrefix(n.Subnet4); err == nil {
		o.IPAM.Config = []network.IPAMConfig{{Subnet: p}}
	}
	o.Options = networkOptions(n)
	o.Labels = n.Labels
	if o.Labels == nil {
		o.Labels = map[string]string{}
	}
	return o
}

func networkOptions(n *store.Network) map[string]string {
	out := map[string]string{optVNI: strconv.FormatUint(uint64(n.Vni), 10)}
	if n.Mtu != 0 {
		out[optMTU] = strconv.FormatUint(uint64(n.Mtu), 10)
	}
	return out
}
