package engine

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/network"

	"skein/overlay"
)

const (
	firstDynamicPort = 32768
	lastDynamicPort  = 60999
)

// bindings are the ports that a container publishes.
func (r record) bindings() network.PortMap {
	out := network.PortMap{}
	for p, b := range r.HostConfig.PortBindings {
		if len(b) == 0 {
			b = []network.PortBinding{{}}
		}
		out[p] = b
	}
	if r.HostConfig.PublishAllPorts {
		for p := range r.Config.ExposedPorts {
			if _, ok := out[p]; !ok {
				out[p] = []network.PortBinding{{}}
			}
		}
	}
	return out
}

// way is the leg by which a family of addresses is reached, and how.
type way struct {
	leg    int // -1: none
	routed bool
	host   netip.Addr // where ports are published that name no address
}

// ways finds the legs that give a sandbox's default routes: ports are published there, so that answers go back as questions came.
func (e *Engine) ways(sb overlay.Sandbox) (out [2]way) {
	byID := map[string]overlay.Bridge{}
	for _, b := range e.nets.bridges() {
		byID[b.ID] = b
	}
	for i, six := range []bool{false, true} {
		w := way{leg: overlay.WayOut(byID, sb.Bridges, six), host: netip.IPv4Unspecified()}
		if six {
			w.host = netip.IPv6Unspecified()
		}
		if w.leg >= 0 {
			l, err := e.nets.find(sb.Bridges[w.leg].BridgeID)
			if err != nil || l.Driver != driverBridge {
				w.leg = -1 // a station on the wire publishes nothing of the node's
			} else if o := l.settings(); six {
				w.routed = o.bridge.Mode6 == overlay.ModeRouted
				if o.defaultHost.IsValid() && !o.defaultHost.IsUnspecified() {
					w.host = netip.Addr{} // ports are for that address alone
				}
			} else {
				w.routed = o.bridge.Mode4 == overlay.ModeRouted
				if o.defaultHost.IsValid() {
					w.host = o.defaultHost
				}
			}
		}
		out[i] = w
	}
	return out
}

// publish chooses host ports for the container's bindings and gives them to the legs that lead out. Ports that the container had already, in
// held, stay what they were. A container on internal networks alone publishes nothing, as with docker.
func (e *Engine) publish(r record, sb *overlay.Sandbox, held []overlay.HostPort) error {
	for i := range sb.Bridges {
		sb.Bridges[i].Ports = nil
	}
	ways := e.ways(*sb)
	bindings := r.bindings()
	for _, p := range sortedPorts(bindings) {
		for _, b := range bindings[p] {
			if err := e.publishOne(r, sb, ways, p, b, &held); err != nil {
				return err
			}
		}
	}
	return nil
}

func (e *Engine) publishOne(r record, sb *overlay.Sandbox, ways [2]way, p network.Port, b network.PortBinding, held *[]overlay.HostPort) error {
	proto := string(p.Proto())
	if proto != "tcp" && proto != "udp" && proto != "sctp" {
		return notBuilt("publishing %s ports is not supported by this version of skein", proto)
	}
	if proto == "sctp" && !e.cfg.Network.SCTP() {
		return notBuilt("publishing sctp ports: the kernel of this node does not track connections of SCTP")
	}
	var at []netip.Addr // addresses that need a port of the node
	var legs []int
	for i, w := range ways {
		six := i == 1
		host := w.host
		if b.HostIP.IsValid() {
			if host = b.HostIP.Unmap(); host.Is6() != six {
				continue
			}
			if w.leg < 0 && slices.ContainsFunc(ways[:], func(w way) bool { return w.leg >= 0 }) {
				return invalid("cannot publish %s on host address %s: container %s has no IPv%d address to be reached at", p, host, r.Name, version(host))
			}
		}
		if w.leg < 0 || !host.IsValid() {
			continue
		}
		if w.routed {
			unspecified := netip.IPv4Unspecified()
			if six {
				unspecified = netip.IPv6Unspecified()
			}
			leg := &sb.Bridges[w.leg]
			leg.Ports = append(leg.Ports, overlay.HostPort{HostIP: unspecified, Target: p.Num(), Protocol: proto})
			continue
		}
		at, legs = append(at, host), append(legs, w.leg)
	}
	if len(at) == 0 {
		return nil
	}
	n, err := e.hostPort(r, proto, b.HostPort, p.Num(), at, held)
	if err != nil {
		return kindError{err, fmt.Sprintf("failed to set up container networking: driver failed programming external connectivity on endpoint %s (%s): %v",
			r.Name, endpointOf(r.ID, sb.Bridges[legs[0]].BridgeID), err)}
	}
	for i, a := range at {
		leg := &sb.Bridges[legs[i]]
		leg.Ports = append(leg.Ports, overlay.HostPort{HostIP: a, Published: n, Target: p.Num(), Protocol: proto})
	}
	return nil
}

// hostPort reserves the wished port or one of the range, or finds a free one, on all of the addresses. One that is held is preferred.
func (e *Engine) hostPort(r record, proto, wish string, target uint16, at []netip.Addr, held *[]overlay.HostPort) (uint16, error) {
	first, last, err := portRange(wish)
	if err != nil {
		return 0, err
	}
	for _, h := range *held {
		n := int(h.Published)
		if h.Protocol == proto && h.Target == target && n >= first && n <= last && e.reservePort(portKey{proto, h.Published}, target, at, r.ID, held) == nil {
			return h.Published, nil
		}
	}
	for n := first; n <= last; n++ {
		err = e.reservePort(portKey{proto, uint16(n)}, target, at, r.ID, held)
		if err == nil {
			return uint16(n), nil
		}
		if cerrdefs.IsInvalidArgument(err) {
			return 0, err
		}
	}
	if first == last {
		return 0, err
	}
	return 0, conflict("all %s ports of %d-%d are allocated", proto, first, last)
}

func portRange(wish string) (first, last int, err error) {
	if wish == "" || wish == "0" {
		return firstDynamicPort, lastDynamicPort, nil
	}
	lo, hi, isRange := strings.Cut(wish, "-")
	if first, err = strconv.Atoi(lo); err == nil {
		last = first
		if isRange {
			last, err = strconv.Atoi(hi)
		}
	}
	if err != nil || first < 1 || last > 65535 || last < first {
		return 0, 0, invalid("invalid host port %q", wish)
	}
	return first, last, nil
}

// reservePort gives a container a port of all the addresses, or of none and says who has it. What the container held for the same target
// already stays its own, once.
func (e *Engine) reservePort(k portKey, target uint16, at []netip.Addr, id string, held *[]overlay.HostPort) error {
	left := slices.Clone(*held)
	var got []netip.Addr
	for _, a := range at {
		i := slices.IndexFunc(left, func(h overlay.HostPort) bool {
			return h.Protocol == k.proto && h.Published == k.port && h.Target == target && hostIP(h.HostIP) == a
		})
		if i >= 0 {
			left = slices.Delete(left, i, i+1)
			continue
		}
		err := e.reserveAt(k, a, id)
		if err != nil {
			for _, back := range got {
				e.ports.free(k, back)
			}
			return err
		}
		got = append(got, a)
	}
	*held = left
	return nil
}

func (e *Engine) reserveAt(k portKey, a netip.Addr, id string) error {
	if holder, ok := e.ports.reserve(k, a, id); !ok {
		return conflict("Bind for %s failed: port is already allocated%s", netip.AddrPortFrom(a, k.port), e.portHolder(holder))
	}
	if err := e.cfg.Network.PortFree(k.proto, a, k.port); err != nil {
		e.ports.free(k, a)
		return errf(kindOf(err), "failed to bind host port for %s/%s: %s", netip.AddrPortFrom(a, k.port), k.proto, withoutKind(err))
	}
	return nil
}

func (e *Engine) portHolder(id string) string {
	if c := e.byID(id); c != nil {
		return ": container " + c.snapshot().Name + " has it"
	}
	return ""
}

// modeHostFree refuses ports in mode host that a process of the node or a container that is no task has. The managers know of neither.
func (e *Engine) modeHostFree(ports []overlay.HostPort) error {
	for _, p := range ports {
		k := portKey{p.Protocol, p.Published}
		for _, a := range []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()} {
			if holder, held := e.ports.holderOf(k, a); held {
				return conflict("host-mode port %d/%s of this node is in use%s", p.Published, p.Protocol, e.portHolder(holder))
			}
			if err := e.cfg.Network.PortUnbound(p.Protocol, a, p.Published); err != nil {
				return errf(kindOf(err), "host-mode port %d/%s of this node: %s", p.Published, p.Protocol, withoutKind(err))
			}
		}
	}
	return nil
}

// kindOf is the kind of an error as far as callers tell kinds apart.
func kindOf(err error) error {
	switch {
	case cerrdefs.IsInvalidArgument(err):
		return cerrdefs.ErrInvalidArgument
	case cerrdefs.IsConflict(err):
		return cerrdefs.ErrConflict
	}
	return errors.Unwrap(err)
}

// withoutKind is an error's text without the word for its kind.
func withoutKind(err error) string {
	text := err.Error()
	for _, k := range []error{cerrdefs.ErrInvalidArgument, cerrdefs.ErrConflict} {
		text = strings.TrimSuffix(text, ": "+k.Error())
	}
	return text
}

type portKey struct {
	proto string
	port  uint16
}

// portTable is which container holds which port at which address of the node, so that two that start at once cannot get the same.
type portTable struct {
	mu     sync.Mutex
	holder map[portKey]map[netip.Addr]string
}

func newPortTable() *portTable { return &portTable{holder: map[portKey]map[netip.Addr]string{}} }

// clash tells that one port cannot be published at both addresses.
func clash(a, b netip.Addr) bool {
	return a == b || a.Is4() == b.Is4() && (a.IsUnspecified() || b.IsUnspecified())
}

// reserve reports whether the container got the port, else who has it.
func (t *portTable) reserve(k portKey, at netip.Addr, id string) (holder string, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for a, h := range t.holder[k] {
		if clash(a, at) {
			return h, false
		}
	}
	if t.holder[k] == nil {
		t.holder[k] = map[netip.Addr]string{}
	}
	t.holder[k][at] = id
	return id, true
}

// holderOf tells which container has a port at an address or one that meets it.
func (t *portTable) holderOf(k portKey, at netip.Addr) (id string, held bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for a, h := range t.holder[k] {
		if clash(a, at) {
			return h, true
		}
	}
	return "", false
}

func (t *portTable) free(k portKey, at netip.Addr) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.drop(k, func(a netip.Addr, _ string) bool { return a == at })
}

func (t *portTable) drop(k portKey, which func(netip.Addr, string) bool) {
	for a, h := range t.holder[k] {
		if which(a, h) {
			delete(t.holder[k], a)
		}
	}
	if len(t.holder[k]) == 0 {
		delete(t.holder, k)
	}
}

func (t *portTable) release(id string) {
	t.retain(id, nil)
}

// retain releases all ports of a container but those given.
func (t *portTable) retain(id string, ports []overlay.HostPort) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for k := range t.holder {
		t.drop(k, func(a netip.Addr, h string) bool {
			return h == id && !slices.ContainsFunc(ports, func(p overlay.HostPort) bool {
				return p.Protocol == k.proto && p.Published == k.port && hostIP(p.HostIP) == a
			})
		})
	}
}
