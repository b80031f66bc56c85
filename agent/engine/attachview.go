package engine

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"github.com/moby/moby/api/types/network"

	"skein/agent"
	"skein/manager/api"
	"skein/overlay"
)

// What this node knows of the cluster's networks that something on it is on, from the tables.

func (a *attachments) noteTables(t agent.Tables) {
	a.mu.Lock()
	a.tables = t
	a.mu.Unlock()
}

// clusterNetworks shows the networks of the cluster that this node has tables of: what the managers show of them with what only the node knows,
// its containers on them.
func (e *Engine) clusterNetworks() []network.Inspect {
	e.attach.mu.Lock()
	t := e.attach.tables
	e.attach.mu.Unlock()
	var out []network.Inspect
	for _, id := range sortedKeys(t.Networks) {
		tab := t.Networks[id]
		if tab.Network == nil {
			continue
		}
		in := describeNetwork(tab.Network)
		in.Containers = e.containersOn(id)
		in.Peers, in.Services = peersOf(tab), servicesOf(tab, t)
		out = append(out, in)
	}
	if n := t.Mesh.Network; n.GetId() != "" {
		in := describeNetwork(n)
		in.Peers, in.Containers = peersOf(t.Mesh), map[string]network.EndpointResource{}
		for _, c := range e.all() {
			if r := c.snapshot(); r.Task != "" && t.Mesh.Endpoints[r.Task] != nil && !r.State.Clean {
				res := network.EndpointResource{Name: r.Name, EndpointID: r.Task}
				res.IPv4Address, res.IPv6Address = single(r.Sandbox.Gateway4), single(r.Sandbox.Gateway6)
				in.Containers[r.ID] = res
			}
		}
		out = append(out, in)
	}
	return out
}

// minIPv6MTU is the least with which the kernel lets a device have IPv6.
const minIPv6MTU = 1280

// linkMTU is the MTU of devices for a wish; 0 is none.
func linkMTU(wish int) int {
	if wish == 0 {
		return 0
	}
	return max(wish, minIPv6MTU)
}

// single is the prefix of one address.
func single(a netip.Addr) netip.Prefix {
	if !a.IsValid() {
		return netip.Prefix{}
	}
	return netip.PrefixFrom(a, a.BitLen())
}

// describeNetwork is what a record says; managers say more.
func describeNetwork(n *api.NetworkRecord) network.Inspect {
	var in network.Inspect
	in.Name, in.ID, in.Created, in.Scope, in.Driver, in.EnableIPv4 = n.Name, n.Id, time.Unix(0, n.Meta.GetCreated()).UTC(), "swarm", n.Driver, true
	in.Internal, in.Attachable, in.Ingress, in.EnableIPv6 = n.Internal, n.Attachable, n.Ingress, n.Subnet6 != ""
	in.IPAM.Driver = "default"
	for _, s := range []string{n.Subnet4, n.Subnet6} {
		if p, err := netip.ParsePrefix(s); err == nil {
			in.IPAM.Config = append(in.IPAM.Config, network.IPAMConfig{Subnet: p})
		}
	}
	in.Options = map[string]string{"com.docker.network.driver.overlay.vxlanid_list": strconv.FormatUint(uint64(n.Vni), 10)}
	in.Labels = n.Labels
	if in.Labels == nil {
		in.Labels = map[string]string{}
	}
	return in
}

// containersOn lists this node's containers on a network of the cluster, tasks among them.
func (e *Engine) containersOn(id string) map[string]network.EndpointResource {
	out := map[string]network.EndpointResource{}
	for _, c := range e.all() {
		r := c.snapshot()
		for _, l := range r.Sandbox.Legs {
			if l.NetworkID == id && !r.State.Clean {
				out[r.ID] = network.EndpointResource{Name: r.Name, EndpointID: endpointID(r), MacAddress: network.HardwareAddr(overlay.StationOfLeg(l)), IPv4Address: l.Addr4, IPv6Address: l.Addr6}
			}
		}
	}
	return out
}

// endpointID names a container's endpoints.
func endpointID(r record) string {
	if r.Task != "" {
		return r.Task
	}
	return r.ID
}

// peersOf lists the nodes that something of a network is on.
func peersOf(t agent.Table) []network.PeerInfo {
	var out []network.PeerInfo
	for _, i := range sortedKeys(t.Nodes) {
		n := t.Nodes[i]
		out = append(out, network.PeerInfo{Name: n.NodeId[:min(12, len(n.NodeId))], IP: addr(n.UnderlayAddr)})
	}
	return out
}

// servicesOf lists a network's services with their tasks, and under the empty name the containers that are none, as docker does.
func servicesOf(t agent.Table, all agent.Tables) map[string]network.ServiceInfo {
	out := map[string]network.ServiceInfo{}
	byService := map[string][]network.Task{}
	for _, id := range sortedKeys(t.Endpoints) {
		ep := t.Endpoints[id]
		if ep.State != "ready" {
			continue
		}
		host := ""
		if n := t.Nodes[ep.NodeIndex]; n != nil {
			host = n.UnderlayAddr
		}
		name := id
		if len(ep.Names) > 0 {
			name = ep.Names[0]
		}
		byService[ep.ServiceId] = append(byService[ep.ServiceId], network.Task{Name: name, EndpointID: id, EndpointIP: addr(ep.Addr4), Info: map[string]string{"Host IP": host}})
	}
	for _, id := range sortedKeys(t.Services) {
		s := t.Services[id]
		info := network.ServiceInfo{VIP: addr(s.Vip4), Ports: []string{}, Tasks: byService[id]}
		if m := all.Mesh.Services[id]; m != nil {
			for _, p := range m.Ports {
				info.Ports = append(info.Ports, fmt.Sprintf("Target: %d, Publish: %d", p.Target, p.Published))
			}
		}
		if info.Tasks == nil {
			info.Tasks = []network.Task{}
		}
		out[s.Name] = info
	}
	if plain := byService[""]; len(plain) > 0 {
		slices.SortFunc(plain, func(a, b network.Task) int { return a.EndpointIP.Compare(b.EndpointIP) })
		out[""] = network.ServiceInfo{VIP: netip.Addr{}, Ports: []string{}, Tasks: plain}
	}
	return out
}
