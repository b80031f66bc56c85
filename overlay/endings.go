package overlay

import (
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"skein/overlay/nft"
)

// What is in the connection tracking table decides where a client's packets go, whatever the slots say. So entries are ended
//
//   - of a backend that takes no new clients: those of UDP, which have no end of their own and would lead to a process that is about to
//     stop, and those that never saw an answer. The client's next packet is dealt anew.
//   - of a backend that is gone, or whose node does not answer (lost.go): all. Clients of TCP are told (reset.go): they may be waiting for an
//     answer and would never send a packet to find out.

// endings are which backends of published ports there were and are.
type endings struct {
	backends map[netip.Addr]bool // now
	dealt    map[netip.Addr]bool // when the flows were looked at last; nil: not in this daemon's life
	known    map[netip.Addr]bool // as dealt, and those that leave or are lost
}

// endMeshFlows ends what led to backends that left with the change under way.
func (d *Driver) endMeshFlows() error {
	e := &d.mesh.ends
	known := map[netip.Addr]bool{}
	note := func(list []Backend) {
		for _, b := range list {
			known[b.Addr4], known[b.Addr6] = true, true
		}
	}
	for _, p := range d.cfg.Mesh.Ports {
		note(p.Backends)
		note(p.Soon)
	}
	note(d.cfg.Mesh.Leaving)
	note(d.cfg.Mesh.Lost)
	var left, gone []netip.Addr
	for a := range e.dealt {
		if !e.backends[a] && known[a] {
			left = append(left, a)
		}
	}
	for a := range e.known {
		if !known[a] {
			gone = append(gone, a)
		}
	}
	var err error
	if e.dealt == nil { // what left while no daemon was here
		err = d.endStrays(known)
	} else {
		_, err = d.nft.EndFlows(movable, left...)
		err = errors.Join(err, end(d.host, d.nft, gone...))
	}
	if err != nil {
		return err
	}
	e.dealt, e.known = e.backends, known
	return nil
}

// endStrays ends all flows to backends on the mesh that nobody knows.
func (d *Driver) endStrays(known map[netip.Addr]bool) error {
	ended, err := d.nft.EndAnyFlows(func(f nft.Flow) bool {
		onMesh := d.cfg.MeshPool.Contains(f.Backend) || (d.cfg.MeshPool6.IsValid() && d.cfg.MeshPool6.Contains(f.Backend))
		return onMesh && f.Dealt() && !known[f.Backend] && !d.isLocalGateway(f.Backend)
	})
	if err != nil {
		return err
	}
	return reset(d.host, ended)
}

// endNetworkFlows ends what led to endpoints that a network's new state has no more, or that take no new clients.
func (r *router) endNetworkFlows(nw *Network) error {
	if r.applied == nil {
		return nil
	}
	now := make(map[netip.Addr]EndpointState, 2*len(nw.Endpoints))
	for i := range nw.Endpoints {
		e := &nw.Endpoints[i]
		now[e.Addr4], now[e.Addr6] = e.State, e.State
	}
	var left, gone []netip.Addr
	for i := range r.applied.Endpoints {
		e := &r.applied.Endpoints[i]
		for _, a := range []netip.Addr{e.Addr4, e.Addr6} {
			state, here := now[a]
			switch {
			case !a.IsValid():
			case !here:
				gone = append(gone, a)
			case e.State == Ready && state != Ready:
				left = append(left, a)
			}
		}
	}
	_, err := r.nft.EndFlows(func(f nft.Flow) bool { return f.Dealt() && movable(f) }, left...)
	return errors.Join(err, end(r.ns, r.nft, gone...))
}

// movable flows lose nothing when they are dealt anew.
func movable(f nft.Flow) bool { return f.Protocol == unix.IPPROTO_UDP || !f.Answered }

// end ends all flows to backends, and tells their clients.
func end(ns namespace, flows *nft.Syncer, backends ...netip.Addr) error {
	ended, err := flows.EndFlows(func(nft.Flow) bool { return true }, backends...)
	if err == nil {
		err = reset(ns, ended)
	}
	if err != nil {
		return fmt.Errorf("end connections to %v: %w", backends, err)
	}
	return nil
}
