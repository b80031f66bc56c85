package overlay

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"skein/overlay/link"
	"skein/overlay/nft"
)

// box is a sandbox of a container that this driver was told of.
type box struct {
	spec Sandbox
	told map[string]told // by network; of the gateway leg by "mesh"
}

// AddSandbox makes a container's namespace with its legs, or mends one that exists: missing legs are added, surplus ones removed, the
// names of those that stay do not change. It returns the namespace's file. A sandbox that an earlier daemon made complete is accepted
// before the first Set, too: its legs work as they are, and its DNS answers, which need the config's names, go on with that Set.
func (d *Driver) AddSandbox(ctx context.Context, s Sandbox) (string, error) {
	if err := validateSandbox(s); err != nil {
		return "", err
	}
	s = d.withoutIPv6(s)
	defer d.ids.lock(s.ID)()
	if err := d.awaitRoom(ctx, s); err != nil {
		return "", fmt.Errorf("network of container %s: %w", s.ID, err)
	}
	// Making a namespace is the slowest part and needs no order among containers.
	r, err := d.room(s)
	if err == nil {
		err = d.step(func() error {
			err := d.addSandbox(ctx, s, r)
			if errdefs.IsUnavailable(err) && !d.have && complete(r.conn, s) {
				d.waiting[s.ID], err = s, nil
			}
			return err
		})
		r.close()
	}
	if err != nil {
		return "", fmt.Errorf("network of container %s: %w", s.ID, err)
	}
	return d.sandboxFile(s.ID), nil
}

// complete tells that a sandbox has its legs on overlay networks and its gateway leg, of which tables are needed to make one.
func complete(conn *link.Conn, s Sandbox) bool {
	links, err := conn.Links()
	if err != nil {
		return false
	}
	for _, l := range s.Legs {
		if _, ok := byMAC(links, legMAC(overlayLeg, l.Addr4.Addr())); !ok {
			return false
		}
	}
	_, ok := byMAC(links, legMAC(gatewayLeg, s.Gateway4))
	return ok || !s.Gateway4.IsValid()
}

// takeWaiting takes over the sandboxes of an earlier daemon that came before the config.
func (d *Driver) takeWaiting(ctx context.Context) {
	for id, s := range d.waiting {
		err := d.mendSandbox(ctx, s)
		if err != nil { // tried again after the next Set and at the next Check
			d.log.Warn("the network of a running container is not taken over yet", "container", id, "error", err)
			continue
		}
		delete(d.waiting, id)
	}
}

// idLocks orders the calls for one container.
type idLocks struct {
	mu   sync.Mutex
	held map[string]*idLock
}

type idLock struct {
	sync.Mutex
	users int
}

// lock returns the function that unlocks.
func (l *idLocks) lock(id string) func() {
	l.mu.Lock()
	if l.held == nil {
		l.held = map[string]*idLock{}
	}
	k := l.held[id]
	if k == nil {
		k = &idLock{}
		l.held[id] = k
	}
	k.users++
	l.mu.Unlock()
	k.Lock()
	return func() {
		k.Unlock()
		l.mu.Lock()
		defer l.mu.Unlock()
		if k.users--; k.users == 0 {
			delete(l.held, id)
		}
	}
}

func validateSandbox(s Sandbox) error {
	bad := func(format string, a ...any) error {
		return fmt.Errorf("network of container %q: "+format+": %w", append(append([]any{s.ID}, a...), errdefs.ErrInvalidArgument)...)
	}
	if s.ID == "" || len(s.ID) > 128 || strings.ContainsAny(s.ID, "/\x00") || strings.HasPrefix(s.ID, ".") || strings.HasPrefix(s.ID, routerPrefix) {
		return bad("the id cannot name a namespace")
	}
	if s.Gateway6.IsValid() && !s.Gateway4.IsValid() {
		return bad("a gateway leg with IPv6 alone is not built yet")
	}
	seen := map[string]bool{}
	for _, l := range s.Legs {
		if !l.Addr4.IsValid() || !l.Addr4.Addr().Is4() {
			return bad("leg on network %s has no IPv4 address", l.NetworkID)
		}
		if seen[l.NetworkID] {
			return bad("two legs on network %s", l.NetworkID)
		}
		seen[l.NetworkID] = true
	}
	for _, b := range s.Bridges {
		if seen[b.BridgeID] {
			return bad("two legs on bridge %s", b.BridgeID)
		}
		seen[b.BridgeID] = true
		if err := b.validate(); err != nil {
			return bad("%w", err)
		}
	}
	return nil
}

// plan is one leg to be: a veth whose inner end is in the sandbox.
type plan struct {
	outer     *link.Conn
	outerName string
	mac       link.MAC
	mtu       int
	six       bool // it has IPv6 addresses
	inner     func(dev int) []link.Message
	attach    func(dev int) error // configures the outer end
	// conf4 are settings of the outer end; with answersAtOnce it does not wait before it answers for others.
	conf4         map[link.Conf4]uint32
	answersAtOnce bool
	own           *ownLeg // what only legs on single-host networks have
}

// mendSandbox is addSandbox for one whose namespace must exist: one that is gone cannot be mended under a running container.
func (d *Driver) mendSandbox(ctx context.Context, s Sandbox) error {
	ns, err := link.OpenNS(d.sandboxFile(s.ID))
	if err != nil {
		return err
	}
	r := &room{ns: ns}
	defer r.close()
	if r.conn, err = link.Dial(ns); err != nil {
		return err
	}
	return d.addSandbox(ctx, s, r)
}

func (d *Driver) addSandbox(ctx context.Context, s Sandbox, r *room) error {
	links, err := r.links(s)
	if err != nil {
		return err
	}
	fresh := len(links) == 1
	plans, err := d.plans(s)
	if err != nil {
		return err
	}
	if err := d.removeLegs(r.conn, links, s.ID, plans); err != nil {
		return err
	}
	if len(links) > 1 && slices.ContainsFunc(plans, func(p plan) bool { return p.six && p.missing(links) }) {
		// It may have been made for IPv4. Devices that are there stay as they are.
		if err := r.ns.Sysctl(map[string]string{"ipv6/conf/default/disable_ipv6?": "0"}); err != nil {
			return err
		}
	}
	for _, p := range plans {
		if err := ensureLeg(r, links, p); err != nil {
			return err
		}
	}
	old := d.boxes[s.ID]
	d.boxes[s.ID] = &box{spec: s}
	if fresh {
		d.boxes[s.ID].told = d.toTell(s)
	}
	delete(d.waiting, s.ID)
	if err := d.gatewayChanged(s.ID, gateway{s.Gateway4, s.Gateway6}); err != nil {
		return err
	}
	if len(s.Bridges) > 0 || old != nil && len(old.spec.Bridges) > 0 {
		if err := d.applyBridgeRules(false); err != nil {
			return err
		}
	}
	return d.serveDNS(ctx, r, s)
}

// plans lists the legs in the order of their device names: overlays, bridges, gateway.
func (d *Driver) plans(s Sandbox) ([]plan, error) {
	var out []plan
	for _, l := range s.Legs {
		p, err := d.overlayPlan(s, l)
		if err != nil {
			return nil, err
		}
		out = append(out, p)
	}
	for _, l := range s.Bridges {
		p, err := d.bridgePlan(s, l)
		if err != nil {
			return nil, err
		}
		out = append(out, p)
	}
	if s.Gateway4.IsValid() {
		p, err := d.gatewayPlan(s)
		if err != nil {
			return nil, err
		}
		out = append(out, p)
	}
	return out, nil
}

func (d *Driver) overlayPlan(s Sandbox, l Leg) (plan, error) {
	r := d.routers[l.NetworkID]
	if r == nil {
		return plan{}, fmt.Errorf("network %s is not set up on this node yet: its table has not arrived or failed: %w", l.NetworkID, errdefs.ErrUnavailable)
	}
	mac, name := legMAC(overlayLeg, l.Addr4.Addr()), legPrefix+tag(s.ID)
	return plan{outer: r.conn, outerName: name, mac: mac, mtu: r.mtu, six: l.Addr6.IsValid(),
		// Per device: new namespaces have no default for neighbour settings; the others are the namespace's defaults, which a check must see.
		conf4: map[link.Conf4]uint32{link.ProxyARP: 1, link.RPFilter: 1}, answersAtOnce: true,
		inner: func(dev int) []link.Message {
			msgs := append([]link.Message{link.AddAddr(dev, l.Addr4)}, d.rangeRoutes(l, dev)...)
			if l.Addr6.IsValid() {
				msgs = append(msgs, link.AddAddr(dev, host(l.Addr6.Addr())), link.SetNeigh(link.NeighKey{Dev: dev, IP: routerVia6}, outerMAC),
					link.SetRoute(link.RouteKey{Dst: l.Addr6.Masked()}, link.Route{Dev: dev, Via: routerVia6}))
			}
			return msgs
		},
		attach: func(dev int) error {
			var msgs []link.Message
			for _, a := range []netip.Addr{l.Addr4.Addr(), l.Addr6.Addr()} {
				if a.IsValid() {
					msgs = append(msgs, link.SetNeigh(link.NeighKey{Dev: dev, IP: a}, mac), link.SetRoute(link.RouteKey{Dst: host(a)}, link.Route{Dev: dev}))
				}
			}
			return r.conn.Do(msgs)
		}}, nil
}

func (d *Driver) gatewayPlan(s Sandbox) (plan, error) {
	if d.mesh.device == 0 {
		return plan{}, fmt.Errorf("the mesh is not set up on this node yet: %w", errdefs.ErrUnavailable)
	}
	name := gatewayPrefix + tag(s.ID)
	mac := legMAC(gatewayLeg, s.Gateway4)
	own := nodeAddr(d.cfg.MeshPool, d.cfg.Self.Index)
	six := s.Gateway6.IsValid() && d.cfg.MeshPool6.IsValid()
	return plan{outer: d.conn, outerName: name, mac: mac, mtu: d.mesh.mtu, six: six,
		conf4: map[link.Conf4]uint32{link.RPFilter: 1, link.RouteLocalnet: 1, link.SendRedirects: 0}, // it sends from its own address only
		inner: func(dev int) []link.Message {
			msgs := []link.Message{link.AddAddr(dev, host(s.Gateway4)), link.SetNeigh(link.NeighKey{Dev: dev, IP: gatewayVia}, outerMAC),
				link.SetRoute(link.RouteKey{Dst: anywhere4}, link.Route{Dev: dev, Via: gatewayVia, Src: s.Gateway4})}
			if six {
				msgs = append(msgs, link.AddAddr(dev, host(s.Gateway6)), link.SetNeigh(link.NeighKey{Dev: dev, IP: routerVia6}, outerMAC),
					link.SetRoute(link.RouteKey{Dst: anywhere6}, link.Route{Dev: dev, Via: routerVia6, Src: s.Gateway6}))
			}
			return msgs
		},
		attach: func(dev int) error {
			set := map[string]string{"ipv6/conf/" + name + "/accept_ra?": "0"} // a container is no router for its node
			msgs := []link.Message{link.SetNeigh(link.NeighKey{Dev: dev, IP: s.Gateway4}, mac), link.SetRoute(link.RouteKey{Dst: host(s.Gateway4)}, link.Route{Dev: dev, Src: own})}
			if six {
				set["ipv6/conf/"+name+"/disable_ipv6"] = "0"
				msgs = append(msgs, link.SetNeigh(link.NeighKey{Dev: dev, IP: s.Gateway6}, mac),
					link.SetRoute(link.RouteKey{Dst: host(s.Gateway6)}, link.Route{Dev: dev, Src: nodeAddr6(d.cfg.MeshPool6, d.cfg.Self.Index)}),
					link.AddLoopback(dev))
			}
			if err := d.host.Sysctl(set); err != nil {
				return err
			}
			return d.conn.Do(msgs, unix.EEXIST)
		}}, nil
}

// ensureLeg makes the pair unless both ends are there, and configures both ends in either case.
func ensureLeg(r *room, links map[string]link.Link, p plan) error {
	if p.own != nil && p.own.macvlan != nil {
		return p.ensureMacvlan(r.ns, r.conn, links)
	}
	inner, made, err := p.pair(r, links)
	if err != nil {
		return err
	}
	if err := p.ready(r.ns, r.conn, inner); err != nil {
		return err
	}
	if err := r.conn.Do(append([]link.Message{link.Up(inner.Index)}, p.inner(inner.Index)...)); err != nil {
		return fmt.Errorf("configure %s: %w", inner.Name, err)
	}
	outer, err := p.outer.AwaitActive(p.outerName)
	if err != nil {
		return err
	}
	if p.six { // until its device is active, an IPv6 address is kept back
		if _, err := r.conn.AwaitActive(inner.Name); err != nil {
			return err
		}
	}
	err = p.settle(outer, made)
	if err == nil {
		err = p.attach(outer.Index)
	}
	if err != nil {
		return fmt.Errorf("configure outer end of %s: %w", inner.Name, err)
	}
	return nil
}

// settle writes the settings of the outer end: of a new one by requests, which is much faster, else by files, which an audit compares.
func (p plan) settle(outer link.Link, made bool) error {
	if made {
		var msgs []link.Message
		if len(p.conf4) > 0 {
			msgs = append(msgs, link.SetConf4(outer.Index, p.conf4))
		}
		if p.answersAtOnce {
			msgs = append(msgs, link.SetProxyDelay(outer.Index, 0))
		}
		return p.outer.Do(msgs)
	}
	set := map[string]string{}
	for c, v := range p.conf4 {
		set[c.Key(p.outerName)] = strconv.FormatUint(uint64(v), 10)
	}
	if p.answersAtOnce {
		set[link.ProxyDelayKey(p.outerName)] = "0"
	}
	if len(set) == 0 {
		return nil
	}
	return p.outer.NS.Sysctl(set)
}

// pair makes both ends unless they are there, the outer one up, and returns the inner one.
func (p plan) pair(r *room, links map[string]link.Link) (inner link.Link, made bool, err error) {
	if r.fresh { // nothing is there, unless an attempt before failed halfway
		inner, err := p.newPair(r, links)
		if !errors.Is(err, unix.EEXIST) {
			return inner, true, err
		}
	}
	outer, err := p.outer.Link(p.outerName)
	if err != nil && !errors.Is(err, unix.ENODEV) {
		return inner, false, err
	}
	inner, there := p.find(links)
	if err == nil && there {
		if p.six { // it may have been made without
			if err := r.ns.Sysctl(map[string]string{"ipv6/conf/" + inner.Name + "/disable_ipv6": "0"}); err != nil {
				return inner, false, err
			}
		}
		if !outer.Up {
			err = p.outer.SetUp(outer.Index, true)
		}
		return inner, false, err
	}
	if err := p.outer.DelLink(p.outerName); err != nil {
		return inner, false, err
	}
	if there {
		if err := r.conn.DelLink(inner.Name); err != nil {
			return inner, false, err
		}
		delete(links, inner.Name)
	}
	inner, err = p.newPair(r, links)
	return inner, true, err
}

func (p plan) newPair(r *room, links map[string]link.Link) (link.Link, error) {
	name, err := p.innerName(links)
	if err != nil {
		return link.Link{}, err
	}
	err = p.outer.AddVeth(link.End{Name: p.outerName, MAC: outerMAC, MTU: p.mtu}, link.End{NS: r.ns, Name: name, MAC: p.mac, MTU: p.mtu})
	if err != nil {
		return link.Link{}, err
	}
	inner, err := r.conn.Link(name)
	if err == nil {
		links[name] = inner
	}
	return inner, err
}

func byMAC(links map[string]link.Link, mac link.MAC) (link.Link, bool) {
	for _, l := range links {
		if l.MAC == mac && l.Kind == "veth" {
			return l, true
		}
	}
	return link.Link{}, false
}

func freeName(links map[string]link.Link) string {
	for i := 0; ; i++ {
		name := "eth" + strconv.Itoa(i)
		if _, taken := links[name]; !taken {
			return name
		}
	}
}

// removeLegs deletes legs of ours in the sandbox that the plans do not have, and all their outer ends.
func (d *Driver) removeLegs(conn *link.Conn, links map[string]link.Link, id string, plans []plan) error {
	want := map[link.MAC]bool{}
	for _, p := range plans {
		want[p.mac] = true
	}
	for name, l := range links {
		if !surplusOwn(l, plans) && (l.Kind != "veth" || want[l.MAC] || l.MAC[0] != 2 || l.MAC[1] < overlayLeg || l.MAC[1] > bridgeLeg) {
			continue
		}
		if err := conn.DelLink(name); err != nil {
			return err
		}
		delete(links, name)
	}
	return nil
}

// gatewayChanged tells the mesh which gateway addresses a sandbox has now (none: zero).
func (d *Driver) gatewayChanged(id string, a gateway) error {
	t := tag(id)
	old := d.mesh.gateways[t]
	if old == a {
		return nil
	}
	if a.v4.IsValid() {
		d.mesh.gateways[t] = a
	} else {
		delete(d.mesh.gateways, t)
	}
	for i, table := range d.mesh.tables {
		was, is := pick(i == 1, old.v4, old.v6), pick(i == 1, a.v4, a.v6)
		if !was.IsValid() || was == is {
			continue
		}
		d.mesh.gone = append(d.mesh.gone, was)
		if table != nil {
			maps.DeleteFunc(table.targets, func(_ string, target netip.Addr) bool { return target == was })
		}
	}
	var err error
	if a.v4.IsValid() { // what used this address before must not be met by what is about to
		err = d.forgetGateways()
	}
	if d.mesh.tables[0] == nil {
		return err
	}
	if old == (gateway{}) {
		d.addGateway(a)
		return errors.Join(err, d.syncMesh(false))
	}
	d.fillPorts() // the leg may come after the port that it serves
	d.fillGateways()
	return errors.Join(err, d.syncMesh(false))
}

// addGateway is fillGateways for one that is new.
func (d *Driver) addGateway(g gateway) {
	for i, t := range d.mesh.tables {
		if a := pick(i == 1, g.v4, g.v6); t != nil && a.IsValid() {
			t.Set("self").Put(nft.SelfKey(a), "")
		}
	}
}

// forgetGateways drops the flows of gateways that are gone.
func (d *Driver) forgetGateways() error {
	_, err := d.nft.ForgetFlows(0, d.mesh.gone...)
	d.mesh.gone = nil
	return err
}

// RemoveSandbox deletes a container's namespace, its legs and DNS sockets. One that does not exist is not an error. Nothing leads to the
// container any more when it returns; what the kernel keeps of it goes soon after, see departure.
func (d *Driver) RemoveSandbox(ctx context.Context, id string) error {
	if err := validateSandbox(Sandbox{ID: id}); err != nil {
		return err
	}
	defer d.ids.lock(id)()
	if d.departs(id) {
		return nil
	}
	d.leaving.Add(1)
	var p *departure
	known := false
	err := d.step(func() error {
		d.leaving.Add(-1)
		known = d.boxes[id] != nil
		var err error
		p, err = d.dismiss(ctx, id)
		return err
	})
	d.depart(p)
	if !known { // nobody knows its addresses, for which others would have to wait
		err = errors.Join(err, d.awaitDeparted(ctx, func(p *departure) bool { return p.id == id }))
	}
	if err != nil {
		return fmt.Errorf("remove network of container %s: %w", id, err)
	}
	return nil
}

// dismiss ends everything that leads to a sandbox; its devices and its namespace are left to the departure.
func (d *Driver) dismiss(ctx context.Context, id string) (*departure, error) {
	b := d.boxes[id]
	t := tag(id)
	p := &departure{id: id, legs: []outerLeg{{d.conn, gatewayPrefix + t}}}
	err := d.stopDNS(ctx, id)
	for network, r := range d.routers {
		if b == nil || slices.ContainsFunc(b.spec.Legs, func(l Leg) bool { return l.NetworkID == network }) {
			p.legs = append(p.legs, outerLeg{r.conn, legPrefix + t})
		}
	}
	p.legs = append(p.legs, d.bridgeLegs(id, b)...)
	if b != nil {
		err = errors.Join(err, d.dropMacvlans(id, b.spec))
	}
	delete(d.waiting, id)
	delete(d.boxes, id)
	if b != nil {
		p.keys = legKeys(b.spec)
		if len(b.spec.Bridges) > 0 {
			d.updateDNS() // its names on bridges are answered to others
		}
	}
	err = errors.Join(err, d.gatewayChanged(id, gateway{}), d.applyBridgeRules(false))
	if d.leaving.Load() == 0 { // else the last of those that leave at the same time does it for all
		err = errors.Join(err, d.forgetGateways())
	}
	return p, err
}
