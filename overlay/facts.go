package overlay

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"skein/overlay/link"
	"skein/overlay/nft"
)

// Facts are what a node sees of its surroundings that its networks must not get in the way of. All lists are sorted.
type Facts struct {
	Routes []FactRoute
	Ports  []PortUse
	// UnderlayMTU is that of the device that carries tunnels; 0: not known.
	UnderlayMTU int
	// NoSession are the nodes that share an encrypted network with this one and do not answer.
	NoSession []uint32
	// PathMTU is the largest packet, outer headers included, that reaches all nodes that were tried; 0: not known. PathPeer is the index of
	// the one for which that is the largest.
	PathMTU  int
	PathPeer uint32
}

// FactRoute is somebody else's route on the node.
type FactRoute struct {
	Prefix netip.Prefix
	Device string // empty: several
}

// PortUse is a port of the node that somebody else has: a process of the host, or a container by its own.
type PortUse struct {
	Protocol string
	Port     uint16
	Holder   string // name of the process, or what else it is
	PID      int    // 0: no process, or not to be seen
}

// Facts looks at the node. It costs some system calls, and a walk through /proc when a process has opened a port since the last time.
func (d *Driver) Facts() (Facts, error) {
	var f Facts
	links, err := d.conn.Links()
	if err == nil {
		f.Routes, err = d.foreignRoutes(links)
	}
	if err != nil {
		return f, fmt.Errorf("facts of this node: %w", err)
	}
	f.PathMTU, f.PathPeer = d.leastPath()
	if f.Ports, err = d.foreignPorts(); err != nil {
		return f, fmt.Errorf("facts of this node: %w", err)
	}
	f.NoSession = d.crypt.Missing()
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.have {
		if mtu, err := d.deviceMTU(d.underlay()); err == nil {
			f.UnderlayMTU = mtu
		}
	}
	return f, nil
}

func (d *Driver) foreignRoutes(links map[string]link.Link) ([]FactRoute, error) {
	names, ours := map[int]string{}, map[int]bool{}
	for name, l := range links {
		names[l.Index] = name
		ours[l.Index] = name == meshDevice || strings.HasPrefix(name, gatewayPrefix) || strings.HasPrefix(name, bridgePrefix) || strings.HasPrefix(l.Alias, bridgeAlias)
	}
	routes, err := d.conn.ForeignRoutes()
	if err != nil {
		return nil, err
	}
	var out []FactRoute
	for _, r := range routes {
		if !ours[r.Dev] {
			out = append(out, FactRoute{r.Dst, names[r.Dev]})
		}
	}
	slices.SortFunc(out, func(a, b FactRoute) int { return cmp.Or(a.Prefix.Compare(b.Prefix), cmp.Compare(a.Device, b.Device)) })
	return slices.Compact(out), nil
}

// foreignPorts lists what listens on the node, and what containers publish there by themselves.
func (d *Driver) foreignPorts() ([]PortUse, error) {
	listeners, err := link.Listeners(d.host)
	if err != nil {
		return nil, err
	}
	inodes := make([]uint32, len(listeners))
	for i, l := range listeners {
		inodes[i] = l.Inode
	}
	owners := d.owners.of(inodes)
	var out []PortUse
	for _, l := range listeners {
		o := owners[l.Inode]
		out = append(out, PortUse{l.Protocol, l.Port, cmp.Or(o.name, unseen), o.pid})
	}
	d.mu.Lock()
	for id, b := range d.boxes {
		for _, l := range b.spec.Bridges {
			for _, p := range l.Ports {
				if p.Published == 0 { // reached at the container's address
					continue
				}
				out = append(out, PortUse{cmp.Or(p.Protocol, "tcp"), p.Published, "container " + id[:min(12, len(id))], 0})
			}
		}
	}
	d.mu.Unlock()
	slices.SortFunc(out, func(a, b PortUse) int {
		return cmp.Or(cmp.Compare(a.Protocol, b.Protocol), cmp.Compare(a.Port, b.Port), cmp.Compare(a.Holder, b.Holder), cmp.Compare(a.PID, b.PID))
	})
	return slices.CompactFunc(out, func(a, b PortUse) bool { return a.Protocol == b.Protocol && a.Port == b.Port }), nil
}

// socketOwners remembers whose sockets are, by inode, so that /proc is walked for new ones only.
type socketOwners struct {
	mu    sync.Mutex
	known map[uint32]owner
}

// unseen holds a socket that no process has open here: a tunnel's, or one of another namespace of processes.
const unseen = "the kernel, or a process that cannot be seen"

// maxOwners is how many are remembered before all are forgotten.
const maxOwners = 4096

type owner struct {
	name string
	pid  int
}

// of finds the processes that have the sockets open.
func (o *socketOwners) of(inodes []uint32) map[uint32]owner {
	o.mu.Lock()
	defer o.mu.Unlock()
	found, missing := map[uint32]owner{}, map[string]uint32{}
	for _, n := range inodes {
		if n == 0 {
			continue
		}
		if k, ok := o.known[n]; ok && k.lives() {
			found[n] = k
		} else {
			missing["socket:["+strconv.FormatUint(uint64(n), 10)+"]"] = n
		}
	}
	if len(missing) > 0 {
		procs, _ := filepath.Glob("/proc/[0-9]*")
		for _, p := range procs {
			fds, err := os.ReadDir(p + "/fd")
			if err != nil {
				continue
			}
			for _, fd := range fds {
				target, err := os.Readlink(p + "/fd/" + fd.Name())
				if n, ok := missing[target]; err == nil && ok && found[n].pid == 0 {
					found[n] = ownerOf(p)
				}
			}
		}
	}
	if o.known == nil || len(o.known) > maxOwners {
		o.known = map[uint32]owner{}
	}
	maps.Copy(o.known, found)
	return found
}

func ownerOf(proc string) owner {
	comm, _ := os.ReadFile(proc + "/comm")
	pid, _ := strconv.Atoi(filepath.Base(proc))
	return owner{strings.TrimSpace(string(comm)), pid}
}

// lives tells that the process is still there, under its name.
func (o owner) lives() bool {
	comm, err := os.ReadFile("/proc/" + strconv.Itoa(o.pid) + "/comm")
	return err == nil && strings.TrimSpace(string(comm)) == o.name
}

// held are published ports that somebody on this node had before they were published. The mesh leaves them alone here.
type held struct {
	ports  map[string]PortUse // by nft.PortKey
	served map[string]bool    // those that the mesh has here; nil: not looked at yet
}

// findHeld looks who has the ports that are not served here yet. What is served stays: it was there first.
func (d *Driver) findHeld() error {
	h := &d.held
	if h.served == nil {
		h.served = map[string]bool{}
		if t := d.mesh.tables[0]; t != nil {
			for k := range t.Set("published").All() {
				h.served[k] = true
			}
		}
	}
	open, wanted := map[string]PublishedPort{}, map[string]bool{}
	for _, p := range d.cfg.Mesh.Ports {
		if proto, ok := protocolNumber(p.Protocol); ok && !p.Local {
			key := nft.PortKey(proto, p.Published)
			wanted[key] = true
			if !h.served[key] {
				open[key] = p
			}
		}
	}
	for k := range h.served {
		if !wanted[k] {
			delete(h.served, k)
		}
	}
	if len(open) == 0 {
		h.ports = nil
		return nil
	}
	uses, err := d.uses(open)
	if err != nil {
		return err
	}
	now := map[string]PortUse{}
	for key, p := range open {
		u, taken := uses[key]
		switch _, before := h.ports[key]; {
		case taken:
			now[key] = u
			if !before {
				d.log.Warn("published port not served on this node: it was in use here before", "port", p.Published, "protocol", p.Protocol, "holder", u.Holder, "pid", u.PID, "service", p.ServiceID)
			}
		default:
			h.served[key] = true
			if before {
				d.log.Info("published port is served on this node now", "port", p.Published, "protocol", p.Protocol, "service", p.ServiceID)
			}
		}
	}
	h.ports = now
	return nil
}

// notHeld are the ports of which this node serves its share.
func (d *Driver) notHeld(ports []PublishedPort) []PublishedPort {
	return slices.DeleteFunc(slices.Clone(ports), func(p PublishedPort) bool {
		proto, _ := protocolNumber(p.Protocol)
		_, taken := d.held.ports[nft.PortKey(proto, p.Published)]
		return taken && !p.Local
	})
}

// uses tells which of the ports somebody else has on this node, by nft.PortKey. The caller holds mu.
func (d *Driver) uses(ports map[string]PublishedPort) (map[string]PortUse, error) {
	listeners, err := link.Listeners(d.host)
	if err != nil {
		return nil, err
	}
	out := map[string]PortUse{}
	add := func(u PortUse, inode uint32) {
		proto, ok := protocolNumber(u.Protocol)
		key := nft.PortKey(proto, u.Port)
		if _, asked := ports[key]; !ok || !asked {
			return
		}
		if inode != 0 {
			o := d.owners.of([]uint32{inode})[inode]
			u.Holder, u.PID = cmp.Or(o.name, unseen), o.pid
		}
		out[key] = u
	}
	for _, l := range listeners {
		add(PortUse{Protocol: l.Protocol, Port: l.Port}, l.Inode)
	}
	for id, b := range d.boxes {
		for _, l := range b.spec.Bridges {
			for _, p := range l.Ports {
				add(PortUse{p.Protocol, p.Published, "container " + id, 0}, 0)
			}
		}
	}
	return out, nil
}

// errNoUnderlay is for a node whose tunnel address is on none of its devices.
var errNoUnderlay = errors.New("no device of this node has the tunnel address")

// deviceMTU is the MTU of the device with an address.
func (d *Driver) deviceMTU(local netip.Addr) (int, error) {
	addrs, err := d.conn.Addrs()
	if err != nil {
		return 0, err
	}
	links, err := d.conn.Links()
	if err != nil {
		return 0, err
	}
	for _, a := range addrs {
		if a.Prefix.Addr() != local {
			continue
		}
		for _, l := range links {
			if l.Index == a.Dev {
				return l.MTU, nil
			}
		}
	}
	return 0, errNoUnderlay
}
