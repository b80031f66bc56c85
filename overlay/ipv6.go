package overlay

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"skein/overlay/link"
)

const (
	forwarding6 = "ipv6/conf/all/forwarding"
	acceptRA    = "accept_ra"
)

var (
	anywhere4 = netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	anywhere6 = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
)

// familyIndex is 0 for IPv4 and 1 for IPv6, as in tables by family.
func familyIndex(a netip.Addr) int {
	if a.Is6() {
		return 1
	}
	return 0
}

// dropIPv6 leaves cfg alone where the kernel has IPv6, else it returns one without.
func (d *Driver) dropIPv6(cfg Config) Config {
	if d.six {
		return cfg
	}
	cfg.MeshPool6 = netip.Prefix{}
	cfg.Networks = slices.Clone(cfg.Networks)
	for i := range cfg.Networks {
		n := &cfg.Networks[i]
		n.Subnet6 = netip.Prefix{}
		n.Services, n.Endpoints = slices.Clone(n.Services), slices.Clone(n.Endpoints)
		for j := range n.Services {
			n.Services[j].VIP6 = netip.Addr{}
		}
		for j := range n.Endpoints {
			n.Endpoints[j].Addr6 = netip.Addr{}
		}
	}
	return cfg
}

// sameFamily are the peers to which this node can have tunnels: a device's tunnels are of one family.
func (d *Driver) sameFamily(cfg Config) []Node {
	own := cfg.Self.Underlay
	if d.opts.Underlay.IsValid() {
		own = d.opts.Underlay
	}
	other := func(p Node) bool { return p.Underlay.Is4() != own.Is4() }
	if !slices.ContainsFunc(cfg.Peers, other) {
		return cfg.Peers
	}
	var out []Node
	for _, p := range cfg.Peers {
		if other(p) {
			d.log.Error("no tunnel to a node, because its address is of another family than this node's: have it join again with another --data-path-addr",
				"node", p.Hostname, "address", p.Underlay, "own", own)
			continue
		}
		out = append(out, p)
	}
	return out
}

// withoutIPv6 is dropIPv6 for a sandbox.
func (d *Driver) withoutIPv6(s Sandbox) Sandbox {
	if d.six {
		return s
	}
	s.Gateway6 = netip.Addr{}
	s.Legs = slices.Clone(s.Legs)
	for i := range s.Legs {
		s.Legs[i].Addr6 = netip.Prefix{}
	}
	return s
}

// setUpMesh6 is the IPv6 part of setUpMesh.
func (d *Driver) setUpMesh6(dev int) error {
	if !d.cfg.MeshPool6.IsValid() {
		return nil
	}
	if err := d.forward6(); err != nil {
		return err
	}
	err := d.host.Sysctl(map[string]string{
		"ipv6/conf/" + meshDevice + "/disable_ipv6": "0", // a host that uses no IPv6 of its own still carries its containers'
		"ipv6/conf/" + meshDevice + "/accept_ra":    "0",
	})
	if err != nil {
		return err
	}
	own := host(nodeAddr6(d.cfg.MeshPool6, d.cfg.Self.Index))
	if err := d.conn.Do([]link.Message{link.AddAddr(dev, own)}); err != nil {
		return fmt.Errorf("set the node's mesh address %s: %w", own, err)
	}
	if err := d.conn.Do([]link.Message{link.AddLoopback(dev)}, unix.EEXIST); err != nil {
		return fmt.Errorf("set the route of ::1 through the mesh: %w", err)
	}
	return nil
}

// addPeers6 adds the IPv6 part of applyPeers. Next hops are link-local, so that the kernel does not look for a route to them.
func (d *Driver) addPeers6(routes map[link.RouteKey]link.Route, neighs map[link.NeighKey]link.MAC, rules map[link.RuleKey]link.Rule) {
	pool, dev := d.cfg.MeshPool6, d.mesh.device
	if !pool.IsValid() {
		return
	}
	own := nodeAddr6(pool, d.cfg.Self.Index)
	for _, p := range d.cfg.Peers {
		via := nodeVia(p.Index, true)
		neighs[link.NeighKey{Dev: dev, IP: via}] = nodeMAC(meshVNI, p.Index)
		routes[link.RouteKey{Dst: nodeBlock6(pool, p.Index)}] = link.Route{Dev: dev, Via: via, Src: own}
		routes[link.RouteKey{Dst: anywhere6, Table: tableBase + p.Index}] = link.Route{Dev: dev, Via: via}
	}
	for k, r := range maps.Clone(rules) {
		k.V6 = true
		rules[k] = r
	}
}

// sysctlFile keeps what the node's kernel settings were before they were changed, until they are changed back.
func (d *Driver) sysctlFile() string { return filepath.Join(d.opts.RunDir, "kernel-settings") }

// forward6 lets the node forward IPv6. A node that forwards believes no router advertisements, unless accept_ra is 2, and forgets the
// routes that it has of them; so every device that listens to routers now goes on doing so. Whoever forwards already has seen to that.
func (d *Driver) forward6() error {
	on, err := d.host.ReadSysctl(forwarding6)
	if err != nil || on != "0" {
		return err
	}
	links, err := d.conn.Links()
	if err != nil {
		return err
	}
	was, set := map[string]string{forwarding6: on}, map[string]string{}
	for name := range links {
		was["ipv6/conf/"+name+"/"+acceptRA] = ""
	}
	was["ipv6/conf/default/"+acceptRA] = ""
	for key, v := range was {
		if v != "" {
			continue
		}
		delete(was, key)
		if v, err := d.host.ReadSysctl(key); err == nil && v == "1" {
			was[key], set[key+"?"] = v, "2"
		}
	}
	if !d.dry {
		if err := d.saveSysctls(was); err != nil {
			return err
		}
	}
	if err := d.host.Sysctl(set); err != nil {
		return err
	}
	return d.host.Sysctl(map[string]string{forwarding6: "1"})
}

// saveSysctls adds to the file what is not there yet: the first value is the host's.
func (d *Driver) saveSysctls(was map[string]string) error {
	all, err := d.savedSysctls()
	if err != nil {
		return err
	}
	for k, v := range was {
		if _, ok := all[k]; !ok {
			all[k] = v
		}
	}
	return d.writeSysctls(all)
}

func (d *Driver) writeSysctls(all map[string]string) error {
	b, err := json.Marshal(all)
	if err != nil {
		return err
	}
	tmp := d.sysctlFile() + ".new"
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return fmt.Errorf("keep the node's kernel settings: %w", err)
	}
	if err := os.Rename(tmp, d.sysctlFile()); err != nil {
		return fmt.Errorf("keep the node's kernel settings: %w", err)
	}
	return nil
}

func (d *Driver) savedSysctls() (map[string]string, error) {
	all := map[string]string{}
	b, err := os.ReadFile(d.sysctlFile())
	if errors.Is(err, os.ErrNotExist) {
		return all, nil
	}
	if err == nil && json.Unmarshal(b, &all) != nil { // a crash between the host's and our write of a file that rests in memory: begin anew
		return map[string]string{}, nil
	}
	return all, err
}

// unforward6 gives the node back the settings that forward6 found. Devices that are gone are left out.
func (d *Driver) unforward6() error {
	was, err := d.savedSysctls()
	if err != nil || len(was) == 0 {
		return err
	}
	if v, ok := was[forwarding6]; ok { // first, or the routers' routes would go
		if err := d.host.Sysctl(map[string]string{forwarding6: v}); err != nil {
			return err
		}
	}
	return d.giveBack(func(key string) bool { return strings.HasPrefix(key, "ipv6/") })
}
