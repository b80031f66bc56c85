package engine

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"sync"
	"time"

	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/network"

	"skein/overlay"
)

// localNetwork is a single-host network.
type localNetwork struct {
	ID         string
	Name       string
	Driver     string // bridge, macvlan, host, null
	Created    time.Time
	Pools      []pool `json:",omitempty"`
	NoIPv4     bool   `json:",omitempty"`
	IPv6       bool   `json:",omitempty"`
	Internal   bool
	Attachable bool   `json:",omitempty"`
	Device     string // of a bridge, or that carries a macvlan
	Options    map[string]string
	Labels     map[string]string
	// ConfigOnly networks are settings for others, which name them in ConfigFrom.
	ConfigOnly bool   `json:",omitempty"`
	ConfigFrom string `json:",omitempty"`
	// Subnet and Gateway are the pool of networks that were made before there could be several.
	Subnet  netip.Prefix `json:",omitzero"`
	Gateway netip.Addr   `json:",omitzero"`
}

// localNetworks is the node's single-host networks and the addresses in use on them.
type localNetworks struct {
	path  string
	apply sync.Mutex   // held over a change and its programming, so that an older list never replaces a newer one
	ula   netip.Prefix // of which IPv6 subnets are chosen
	mu    sync.Mutex
	byID  map[string]*localNetwork
	used  map[string]map[netip.Addr]string // network id → address → container id
	last  map[lastKey]netip.Addr           // address given last
}

const (
	defaultBridge  = "bridge"
	defaultDevice  = "skein0"
	firstBridgeNet = 17 // 172.17.0.0/16, then up to 172.31
)

// loadLocalNetworks reads the networks, or makes the predefined ones, whose bridge keeps clear of the prefixes outside.
func loadLocalNetworks(dir, engineID string, outside func() []netip.Prefix) (*localNetworks, error) {
	n := &localNetworks{path: filepath.Join(dir, "networks.json"), byID: map[string]*localNetwork{}, used: map[string]map[netip.Addr]string{},
		last: map[lastKey]netip.Addr{}, ula: nodeULA(engineID)}
	b, err := os.ReadFile(n.path)
	if err == nil {
		var list []*localNetwork
		if err := json.Unmarshal(b, &list); err != nil {
			return nil, fmt.Errorf("read %s: %w", n.path, err)
		}
		for _, l := range list {
			if l.Subnet.IsValid() && len(l.Pools) == 0 {
				l.Pools = []pool{{Subnet: l.Subnet, Gateway: l.Gateway}}
			}
			l.Subnet, l.Gateway = netip.Prefix{}, netip.Addr{}
			n.byID[l.ID] = l
		}
		return n, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read local networks: %w", err)
	}
	now := time.Now().UTC()
	for _, l := range []*localNetwork{
		{Name: defaultBridge, Driver: driverBridge, Device: defaultDevice},
		{Name: "host", Driver: driverHost},
		{Name: "none", Driver: driverNull},
	} {
		l.ID, l.Created = newContainerID(), now
		if l.Driver == driverBridge {
			if err := n.choosePools(l, nil, outside()); err != nil {
				return nil, fmt.Errorf("default bridge network: %w", err)
			}
		}
		n.byID[l.ID] = l
	}
	return n, n.save()
}

// nodeULA is a /48 of the addresses that nobody routes, as good as unique.
func nodeULA(id string) netip.Prefix {
	sum := sha256.Sum256([]byte("ipv6 subnets of " + id))
	var b [16]byte
	b[0] = 0xfd
	copy(b[1:6], sum[:])
	return netip.PrefixFrom(netip.AddrFrom16(b), 48)
}

// settings are what the network's options mean. They were checked when it was made.
func (l *localNetwork) settings() netOptions {
	o, _ := parseOptions(l.Driver, l.Options)
	return o
}

// wantsGateway tells whether the network's node or router has an address in the subnets of a family.
func (l *localNetwork) wantsGateway(six bool) bool {
	o := l.settings()
	switch {
	case l.Driver != driverBridge:
		return !l.Internal
	case six:
		return !o.isolated6
	}
	return !o.isolated4 && !(l.Internal && o.bridge.Bare4)
}

// first is the first subnet of a family.
func (l *localNetwork) first(six bool) (pool, bool) {
	for _, p := range l.Pools {
		if p.six() == six {
			return p, true
		}
	}
	return pool{}, false
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
		if !l.ConfigOnly && (l.Driver == driverBridge || l.Driver == driverMacvlan) {
			out = append(out, l.bridge())
		}
	}
	return out
}

// bridge is the network as the driver is told of it.
func (l *localNetwork) bridge() overlay.Bridge {
	o := l.settings()
	b := o.bridge
	b.ID, b.Network, b.Name, b.Internal = l.ID, l.Name, l.Device, l.Internal
	for _, p := range l.Pools {
		switch {
		case !p.six() && !b.Subnet4.IsValid():
			b.Subnet4, b.Gateway4 = p.Subnet, p.Gateway
		case p.six() && !b.Subnet6.IsValid():
			b.Subnet6, b.Gateway6 = p.Subnet, p.Gateway
		default:
			b.More = append(b.More, p.Subnet)
		}
	}
	if l.Driver == driverMacvlan {
		b.Macvlan = &overlay.Macvlan{Mode: o.mode}
		b.Macvlan.On, b.Macvlan.VLAN = parentDevice(o.parent)
		b.External = o.parent != ""
	}
	return b
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
	in.Name, in.ID, in.Created, in.Scope, in.Driver = l.Name, l.ID, l.Created, "local", l.Driver
	in.EnableIPv4, in.EnableIPv6 = !l.NoIPv4 && l.Driver != driverNull, l.IPv6
	in.IPAM = network.IPAM{Driver: "default"}
	in.Attachable, in.ConfigOnly, in.ConfigFrom.Network = l.Attachable, l.ConfigOnly, l.ConfigFrom
	in.Internal, in.Options, in.Labels = l.Internal, l.Options, l.Labels
	if in.Options == nil {
		in.Options = map[string]string{}
	}
	if l.Name == defaultBridge && l.Driver == driverBridge {
		in.Options = map[string]string{optDefaultBridge: "true", optICC: "true", optMasquerade: "true", optHostBinding: "0.0.0.0", optBridgeName: l.Device, optMTU: "1500"}
	}
	if in.Labels == nil {
		in.Labels = map[string]string{}
	}
	e.nets.mu.Lock()
	subnets := network.SubnetStatuses{}
	for _, p := range l.Pools {
		in.IPAM.Config = append(in.IPAM.Config, network.IPAMConfig{Subnet: p.Subnet, IPRange: p.Range, Gateway: p.Gateway, AuxAddress: p.Aux})
		if !l.ConfigOnly {
			subnets[p.Subnet] = p.status(e.nets.used[l.ID])
		}
	}
	e.nets.mu.Unlock()
	if len(subnets) > 0 {
		in.Status = &network.Status{IPAM: network.IPAMStatus{Subnets: subnets}}
	}
	for _, c := range e.all() {
		r := c.snapshot()
		for _, b := range r.Sandbox.Bridges {
			if b.BridgeID == l.ID && !r.State.Clean {
				in.Containers[r.ID] = network.EndpointResource{Name: r.Name, EndpointID: endpointOf(r.ID, l.ID), MacAddress: network.HardwareAddr(overlay.StationOf(b)),
					IPv4Address: b.Addr4, IPv6Address: b.Addr6}
			}
		}
	}
	return in
}

// endpointOf names a container's place on a network.
func endpointOf(container, network string) string {
	sum := sha256.Sum256([]byte(container + "@" + network))
	return hex.EncodeToString(sum[:])
}

// NetworkCreate makes a single-host network.
func (e *Engine) NetworkCreate(ctx context.Context, req network.CreateRequest) (network.CreateResponse, error) {
	l, err := e.plannedNetwork(&req)
	if err != nil {
		return network.CreateResponse{}, err
	}
	e.nets.apply.Lock()
	defer e.nets.apply.Unlock()
	if err := e.nets.add(l, req.IPAM, e.outsideRoutes()); err != nil {
		return network.CreateResponse{}, err
	}
	if l.ConfigOnly {
		return network.CreateResponse{ID: l.ID}, nil
	}
	if err := e.cfg.Network.SetBridges(ctx, e.nets.bridges()); err != nil {
		err = errors.Join(err, e.nets.drop(l.ID, nil))
		if back := e.cfg.Network.SetBridges(context.WithoutCancel(ctx), e.nets.bridges()); back != nil {
			e.log.Error("take back a network that could not be made", "network", l.Name, "err", back)
		}
		return network.CreateResponse{}, fmt.Errorf("create network %s: %w", l.Name, err)
	}
	e.emitNetwork(l, events.ActionCreate)
	return network.CreateResponse{ID: l.ID}, nil
}

// plannedNetwork checks a request; what it takes from a configuration is put into the request, too.
func (e *Engine) plannedNetwork(req *network.CreateRequest) (*localNetwork, error) {
	switch {
	case req.Name == "" || req.Name == "default":
		return nil, invalid("network name %q is not allowed", req.Name)
	case req.Name == defaultBridge || req.Name == "host" || req.Name == "none":
		return nil, errf(errDenied, "operation is not permitted on predefined %s network", req.Name)
	case req.Ingress:
		return nil, invalid("the routing mesh's network is the cluster's: create it with driver overlay")
	}
	l := &localNetwork{ID: newContainerID(), Name: req.Name, Driver: req.Driver, Created: time.Now().UTC(), Labels: req.Labels, Attachable: req.Attachable, ConfigOnly: req.ConfigOnly}
	if l.Driver == "" {
		l.Driver = driverBridge
	}
	if err := checkDriver(l.Driver); err != nil {
		return nil, err
	}
	if err := e.inheritConfig(l, req); err != nil {
		return nil, err
	}
	l.Internal, l.Options = req.Internal, req.Options
	return l, e.complete(l, req)
}

func checkDriver(name string) error {
	switch name {
	case driverBridge, driverMacvlan:
		return nil
	case driverHost, driverNull:
		return errf(errDenied, "only one instance of %q network is allowed", name)
	case "ipvlan":
		return notBuilt("network driver ipvlan is not supported by this version of skein: use macvlan, or bridge")
	}
	return notFound("could not find a network driver %q: skein has bridge and macvlan for one node and overlay for a cluster, and no plugins", name)
}

// inheritConfig takes the settings of a configuration network.
func (e *Engine) inheritConfig(l *localNetwork, req *network.CreateRequest) error {
	if req.ConfigFrom == nil || req.ConfigFrom.Network == "" {
		return nil
	}
	if req.ConfigOnly {
		return errf(errDenied, "a configuration network cannot depend on another configuration network")
	}
	if len(req.Options) > 0 || req.IPAM != nil && len(req.IPAM.Config) > 0 || req.EnableIPv6 != nil && *req.EnableIPv6 || req.Internal {
		return errf(errDenied, "user specified configurations are not supported if the network depends on a configuration network")
	}
	c, err := e.nets.find(req.ConfigFrom.Network)
	if err != nil || !c.ConfigOnly {
		return notFound("configuration network %q does not exist", req.ConfigFrom.Network)
	}
	l.ConfigFrom = c.Name
	req.Options, req.Internal, req.EnableIPv4, req.EnableIPv6 = c.Options, c.Internal, flag(!c.NoIPv4), &c.IPv6
	req.IPAM = &network.IPAM{}
	for _, p := range c.Pools {
		req.IPAM.Config = append(req.IPAM.Config, network.IPAMConfig{Subnet: p.Subnet, IPRange: p.Range, Gateway: p.Gateway, AuxAddress: p.Aux})
	}
	if len(l.Labels) == 0 {
		l.Labels = c.Labels
	}
	return nil
}

func flag(b bool) *bool { return &b }

// complete reads options and IPAM settings into the network.
func (e *Engine) complete(l *localNetwork, req *network.CreateRequest) error {
	driver := l.Driver
	if l.ConfigOnly && req.Driver == "" && (l.Options[optParent] != "" || l.Options[optMode] != "") {
		driver = driverMacvlan // for whom the settings are is said by the network that takes them
	}
	o, err := parseOptions(driver, l.Options)
	if err != nil {
		return err
	}
	on := func(asked, option *bool, otherwise bool) bool {
		switch {
		case asked != nil:
			return *asked
		case option != nil:
			return *option
		}
		return otherwise
	}
	l.NoIPv4, l.IPv6 = !on(req.EnableIPv4, o.enable4, true), on(req.EnableIPv6, o.enable6, false)
	if l.NoIPv4 && !l.IPv6 {
		return invalid("IPv4 or IPv6 must be enabled")
	}
	if (o.isolated4 || o.isolated6) && !l.Internal {
		return invalid("gateway mode 'isolated' can only be used for an internal network")
	}
	if i := req.IPAM; i != nil {
		if i.Driver != "" && i.Driver != "default" || len(i.Options) > 0 {
			return notBuilt("IPAM driver %q and its options are not supported by this version of skein", i.Driver)
		}
		if err := checkPools(i.Config, l.IPv6); err != nil {
			return err
		}
	}
	switch {
	case l.ConfigOnly:
		l.Driver = driverNull
	case l.Driver == driverMacvlan:
		if l.Device = o.parent; o.parent == "" { // nothing leaves it
			l.Device, l.Internal = "dm-"+l.ID[:12], true
		}
	default:
		if l.Device = o.bridge.Name; l.Device == "" {
			l.Device = "br-" + l.ID[:12]
		}
	}
	return nil
}

func (n *localNetworks) add(l *localNetwork, ipam *network.IPAM, outside []netip.Prefix) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, o := range n.byID {
		switch {
		case o.Name == l.Name:
			return conflict("network with name %s already exists", l.Name)
		case l.Device == "" || o.Device != l.Device:
		case l.Driver == driverMacvlan && o.Driver == driverMacvlan:
			return errf(errDenied, "network %s is already using parent interface %s", o.Name, l.Device)
		default:
			return errf(errDenied, "cannot create network %s (%s): conflicts with network %s (%s): networks have same bridge name", l.ID, l.Device, o.ID, o.Device)
		}
	}
	var configs []network.IPAMConfig
	if ipam != nil {
		configs = ipam.Config
	}
	if err := n.addPools(l, configs, outside); err != nil {
		return err
	}
	n.byID[l.ID] = l
	if err := n.save(); err != nil {
		delete(n.byID, l.ID)
		return err
	}
	return nil
}

func (n *localNetworks) addPools(l *localNetwork, configs []network.IPAMConfig, outside []netip.Prefix) error {
	if l.ConfigOnly {
		for _, c := range configs {
			if c.Subnet.IsValid() {
				l.Pools = append(l.Pools, pool{Subnet: c.Subnet, Range: c.IPRange, Gateway: c.Gateway, Aux: c.AuxAddress})
			}
		}
		return nil
	}
	if err := n.choosePools(l, configs, outside); err != nil {
		return err
	}
	count := map[bool]int{}
	for _, p := range l.Pools {
		count[p.six()]++
	}
	if l.Driver == driverBridge && (count[false] > 1 || count[true] > 1) {
		return errf(errDenied, "bridge driver doesn't support multiple subnets")
	}
	return nil
}

// drop forgets a network that no container uses; name tells how one of those is called.
func (n *localNetworks) drop(id string, name func(container string) string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	l := n.byID[id]
	if l == nil {
		return notFound("network %s not found", id)
	}
	for _, o := range n.byID {
		if l.ConfigOnly && o.ConfigFrom == l.Name {
			return errf(errDenied, "error while removing network: configuration network %q is in use by network %s", l.Name, o.Name)
		}
	}
	if holders := n.used[id]; len(holders) > 0 {
		var list []string
		for _, c := range slices.Compact(slices.Sorted(maps.Values(holders))) {
			list = append(list, fmt.Sprintf("name:%q id:%q", name(c), endpointOf(c, id)[:12]))
		}
		return errf(errDenied, "error while removing network: network %s has active endpoints (%s)", l.Name, strings.Join(list, ", "))
	}
	delete(n.byID, id)
	delete(n.used, id)
	delete(n.last, lastKey{id, false})
	delete(n.last, lastKey{id, true})
	if err := n.save(); err != nil {
		n.byID[id] = l
		return err
	}
	return nil
}

// containerName is how users call a container, or what is left of it.
func (e *Engine) containerName(id string) string {
	if c := e.byID(id); c != nil {
		return c.snapshot().Name
	}
	return id
}

// NetworkRemove deletes a user-defined network that no container uses.
func (e *Engine) NetworkRemove(ctx context.Context, ref string) error {
	l, err := e.nets.find(ref)
	if err != nil {
		return err
	}
	if l.Name == defaultBridge || !l.ConfigOnly && l.Driver != driverBridge && l.Driver != driverMacvlan {
		return errf(errDenied, "%s is a pre-defined network and cannot be removed", l.Name)
	}
	e.nets.apply.Lock()
	defer e.nets.apply.Unlock()
	if err := e.nets.drop(l.ID, e.containerName); err != nil || l.ConfigOnly {
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
