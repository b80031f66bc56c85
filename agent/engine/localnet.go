package engine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"sort"
	"sync"
	"time"

	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/network"

	"skein/overlay"
)

// localNetwork is a single-host network.
type localNetwork struct {
	ID       string
	Name     string
	Driver   string // bridge, host, null
	Created  time.Time
	Subnet   netip.Prefix
	Gateway  netip.Addr
	Internal bool
	Device   string
	Options  map[string]string
	Labels   map[string]string
}

// localNetworks is the node's single-host networks and the addresses in use on them.
type localNetworks struct {
	path  string
	apply sync.Mutex // held over a change and its programming, so that an older list never replaces a newer one
	mu    sync.Mutex
	byID  map[string]*localNetwork
	used  map[string]map[netip.Addr]string // network id → address → container id
	last  map[string]netip.Addr            // network id → address given last
}

const (
	defaultBridge  = "bridge"
	bridgeMTU      = 0  // the driver's choice
	firstBridgeNet = 17 // 172.17.0.0/16, then up to 172.31
)

func loadLocalNetworks(dir string) (*localNetworks, error) {
	n := &localNetworks{path: filepath.Join(dir, "networks.json"), byID: map[string]*localNetwork{}, used: map[string]map[netip.Addr]string{},
		last: map[string]netip.Addr{}}
	b, err := os.ReadFile(n.path)
	if err == nil {
		var list []*localNetwork
		if err := json.Unmarshal(b, &list); err != nil {
			return nil, fmt.Errorf("read %s: %w", n.path, err)
		}
		for _, l := range list {
			n.byID[l.ID] = l
		}
		return n, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read local networks: %w", err)
	}
	now := time.Now().UTC()
	sub := netip.PrefixFrom(netip.AddrFrom4([4]byte{172, firstBridgeNet, 0, 0}), 16)
	for _, l := range []*localNetwork{
		{Name: defaultBridge, Driver: "bridge", Subnet: sub, Gateway: sub.Addr().Next(), Device: "skein0"},
		{Name: "host", Driver: "host"},
		{Name: "none", Driver: "null"},
	} {
		l.ID, l.Created = newContainerID(), now
		n.byID[l.ID] = l
	}
	return n, n.save()
}

// save writes all networks. The caller holds mu, or is alone.
func (n *localNetworks) save() error {
	if err := writeJSON(n.path, n.list()); err != nil {
		return fmt.Errorf("write local networks: %w", err)
	}
	return nil
}

func (n *localNetworks) list() []*localNetwork {
	out := make([]*localNetwork, 0, len(n.byID))
	for _, l := range n.byID {
		out = append(out, l)
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Name < out[j].Name })
	return out
}

func (n *localNetworks) bridges() []overlay.Bridge {
	n.mu.Lock()
	defer n.mu.Unlock()
	var out []overlay.Bridge
	for _, l := range n.list() {
		if l.Driver == "bridge" {
			out = append(out, overlay.Bridge{ID: l.ID, Name: l.Device, Subnet4: l.Subnet, Gateway4: l.Gateway, Internal: l.Internal, MTU: bridgeMTU})
		}
	}
	return out
}

// find resolves a name, id or unique id prefix.
func (n *localNetworks) find(ref string) (*localNetwork, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.findLocked(ref)
}

func (n *localNetworks) findLocked(ref string) (*localNetwork, error) {
	if l, ok := n.byID[ref]; ok {
		return l, nil
	}
	var found *localNetwork
	for _, l := range n.byID {
		if l.Name == ref {
			return l, nil
		}
		if ref != "" && hasPrefix(l.ID, ref) {
			if found != nil {
				return nil, invalid("network %s is ambiguous (2 matches found on ID prefix)", ref)
			}
			found = l
		}
	}
	if found == nil {
		return nil, notFound("network %s not found", ref)
	}
	return found, nil
}

// take reserves an address for the container: want if valid, else the next free one after the last that was given, so that what leaves has
// time to go.
func (n *localNetworks) take(l *localNetwork, containerID string, want netip.Addr) (netip.Prefix, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.byID[l.ID] == nil {
		return netip.Prefix{}, notFound("network %s not found", l.Name)
	}
	used := n.used[l.ID]
	if used == nil {
		used = map[netip.Addr]string{}
		n.used[l.ID] = used
	}
	if want.IsValid() {
		if !l.Subnet.Contains(want) || want == l.Subnet.Addr() || !l.Subnet.Contains(want.Next()) {
			return netip.Prefix{}, invalid("invalid address %s: it is not an address for containers in the subnet %s of network %s", want, l.Subnet, l.Name)
		}
		if holder, taken := used[want]; taken && holder != containerID || want == l.Gateway {
			return netip.Prefix{}, conflict("address %s of network %s is already in use", want, l.Name)
		}
		used[want] = containerID
		return netip.PrefixFrom(want, l.Subnet.Bits()), nil
	}
	first := l.Subnet.Addr().Next()
	begin := first
	if last := n.last[l.ID]; last.IsValid() && l.Subnet.Contains(last.Next().Next()) {
		begin = last.Next()
	}
	for a, again := begin, false; !again || a != begin; {
		if _, taken := used[a]; !taken && a != l.Gateway {
			used[a], n.last[l.ID] = containerID, a
			return netip.PrefixFrom(a, l.Subnet.Bits()), nil
		}
		if a = a.Next(); !l.Subnet.Contains(a.Next()) {
			a, again = first, true
		}
	}
	return netip.Prefix{}, conflict("network %s has no free address left in %s: remove containers or create a larger network", l.Name, l.Subnet)
}

func (n *localNetworks) give(networkID, containerID string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for a, id := range n.used[networkID] {
		if id == containerID {
			delete(n.used[networkID], a)
		}
	}
}

// NetworkList returns the single-host networks.
func (e *Engine) NetworkList(context.Context) ([]network.Inspect, error) {
	e.nets.mu.Lock()
	list := e.nets.list()
	e.nets.mu.Unlock()
	out := make([]network.Inspect, 0, len(list))
	for _, l := range list {
		out = append(out, e.inspectNetwork(l))
	}
	return append(out, e.clusterNetworks()...), nil
}

func (e *Engine) inspectNetwork(l *localNetwork) network.Inspect {
	in := network.Inspect{Containers: map[string]network.EndpointResource{}}
	in.Name, in.ID, in.Created, in.Scope, in.Driver, in.EnableIPv4 = l.Name, l.ID, l.Created, "local", l.Driver, true
	in.IPAM = network.IPAM{Driver: "default", Config: []network.IPAMConfig{}}
	if l.Subnet.IsValid() {
		in.IPAM.Config = append(in.IPAM.Config, network.IPAMConfig{Subnet: l.Subnet, Gateway: l.Gateway})
	}
	in.Internal, in.Options, in.Labels = l.Internal, l.Options, l.Labels
	if in.Options == nil {
		in.Options = map[string]string{}
	}
	if in.Labels == nil {
		in.Labels = map[string]string{}
	}
	for _, c := range e.all() {
		r := c.snapshot()
		for _, b := range r.Sandbox.Bridges {
			if b.BridgeID == l.ID && !r.State.Clean {
				in.Containers[r.ID] = network.EndpointResource{Name: r.Name, EndpointID: r.ID, IPv4Address: b.Addr4}
			}
		}
	}
	return in
}

// NetworkCreate makes a bridge network.
func (e *Engine) NetworkCreate(ctx context.Context, req network.CreateRequest) (network.CreateResponse, error) {
	if req.Name == "" || req.Name == "default" {
		return network.CreateResponse{}, invalid("network name %q is not allowed", req.Name)
	}
	if req.Driver != "" && req.Driver != "bridge" {
		return network.CreateResponse{}, notBuilt("network driver %q is not supported by this version of skein on a single host: use bridge, or overlay in a swarm", req.Driver)
	}
	if req.EnableIPv6 != nil && *req.EnableIPv6 {
		return network.CreateResponse{}, notBuilt("IPv6 on bridge networks is not supported by this version of skein")
	}
	l := &localNetwork{
		ID: newContainerID(), Name: req.Name, Driver: "bridge", Created: time.Now().UTC(), Internal: req.Internal, Options: req.Options, Labels: req.Labels,
	}
	if err := checkNetworkRequest(req); err != nil {
		return network.CreateResponse{}, err
	}
	e.nets.apply.Lock()
	defer e.nets.apply.Unlock()
	l.Device = "skb-" + l.ID[:8]
	if err := e.nets.add(l, req.IPAM); err != nil {
		return network.CreateResponse{}, err
	}
	if err := e.cfg.Network.SetBridges(ctx, e.nets.bridges()); err != nil {
		_ = e.nets.drop(l.ID)
		return network.CreateResponse{}, fmt.Errorf("create network %s: %w", l.Name, err)
	}
	e.emitNetwork(l, events.ActionCreate)
	return network.CreateResponse{ID: l.ID}, nil
}

// checkNetworkRequest refuses by name what would be ignored.
func checkNetworkRequest(req network.CreateRequest) error {
	for k := range req.Options {
		return notBuilt("network option %s is not supported by this version of skein", k)
	}
	if req.ConfigOnly || req.ConfigFrom != nil {
		return notBuilt("configuration-only networks are not supported by this version of skein")
	}
	if req.EnableIPv4 != nil && !*req.EnableIPv4 {
		return notBuilt("networks without IPv4 are not supported by this version of skein")
	}
	if i := req.IPAM; i != nil {
		if i.Driver != "" && i.Driver != "default" || len(i.Options) > 0 {
			return notBuilt("IPAM driver %q and its options are not supported by this version of skein", i.Driver)
		}
		for _, c := range i.Config {
			if c.IPRange.IsValid() || len(c.AuxAddress) > 0 {
				return notBuilt("--ip-range and --aux-address are not supported by this version of skein")
			}
		}
	}
	return nil
}

func (n *localNetworks) add(l *localNetwork, ipam *network.IPAM) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if _, err := n.findLocked(l.Name); err == nil {
		return conflict("network with name %s already exists", l.Name)
	}
	if ipam != nil && len(ipam.Config) > 1 {
		return notBuilt("several subnets on one bridge network are not supported by this version of skein")
	}
	if ipam != nil && len(ipam.Config) == 1 {
		l.Subnet, l.Gateway = ipam.Config[0].Subnet.Masked(), ipam.Config[0].Gateway
	}
	if !l.Subnet.IsValid() {
		for i := firstBridgeNet; i < 32 && !l.Subnet.IsValid(); i++ {
			p := netip.PrefixFrom(netip.AddrFrom4([4]byte{172, byte(i), 0, 0}), 16)
			if n.overlaps(p) == nil {
				l.Subnet = p
			}
		}
		if !l.Subnet.IsValid() {
			return conflict("no subnet is left for network %s in 172.17.0.0–172.31.255.255: name one with --subnet", l.Name)
		}
	} else if o := n.overlaps(l.Subnet); o != nil {
		return invalid("cannot create network %s: subnet %s overlaps with %s of network %s", l.Name, l.Subnet, o.Subnet, o.Name)
	}
	if !l.Subnet.Addr().Is4() || l.Subnet.Bits() > 30 {
		return invalid("subnet %s of network %s: want an IPv4 prefix of at most 30 bits", l.Subnet, l.Name)
	}
	if !l.Gateway.IsValid() {
		l.Gateway = l.Subnet.Addr().Next()
	}
	if !l.Subnet.Contains(l.Gateway) {
		return invalid("gateway %s of network %s is not in its subnet %s", l.Gateway, l.Name, l.Subnet)
	}
	n.byID[l.ID] = l
	if err := n.save(); err != nil {
		delete(n.byID, l.ID)
		return err
	}
	return nil
}

func (n *localNetworks) overlaps(p netip.Prefix) *localNetwork {
	for _, o := range n.byID {
		if o.Subnet.IsValid() && o.Subnet.Overlaps(p) {
			return o
		}
	}
	return nil
}

// drop forgets a network that no container uses.
func (n *localNetworks) drop(id string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	l := n.byID[id]
	if l == nil {
		return notFound("network %s not found", id)
	}
	if len(n.used[id]) > 0 {
		return errf(errDenied, "error while removing network: network %s has active endpoints", l.Name)
	}
	delete(n.byID, id)
	delete(n.used, id)
	delete(n.last, id)
	if err := n.save(); err != nil {
		n.byID[id] = l
		return err
	}
	return nil
}

// NetworkRemove deletes a user-defined bridge that no container uses.
func (e *Engine) NetworkRemove(ctx context.Context, ref string) error {
	l, err := e.nets.find(ref)
	if err != nil {
		return err
	}
	if l.Name == defaultBridge || l.Driver != "bridge" {
		return errf(errDenied, "%s is a pre-defined network and cannot be removed", l.Name)
	}
	e.nets.apply.Lock()
	defer e.nets.apply.Unlock()
	if err := e.nets.drop(l.ID); err != nil {
		return err
	}
	if err := e.cfg.Network.SetBridges(ctx, e.nets.bridges()); err != nil {
		return fmt.Errorf("remove network %s: %w", l.Name, err)
	}
	e.emitNetwork(l, events.ActionDestroy)
	return nil
}

func (e *Engine) emitNetwork(l *localNetwork, action events.Action) {
	e.events.publish(events.Message{Type: events.NetworkEventType, Action: action, Actor: events.Actor{ID: l.ID, Attributes: map[string]string{"name": l.Name, "type": l.Driver}}})
}
