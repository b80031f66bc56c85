package overlay

import (
	"net"
	"slices"
	"sync"
	"time"

	"skein/overlay/link"
)

const (
	// readyNamespaces are kept for the next containers: as many as start at once now and then. One holds about 100 KiB of the kernel's memory.
	readyNamespaces = 4
	// refillDelay leaves the machine to the container that took a namespace.
	refillDelay = 20 * time.Millisecond
)

// room is a namespace with a connection into it. Until it is mounted a new one belongs to this process alone and is gone with it.
type room struct {
	ns   *link.NS
	conn *link.Conn
	// fresh: it is new and has nothing but its loopback, which is up, and kernel parameters for its kind.
	fresh bool
	// udp and tcp are DNS sockets that wait for a container; nil without.
	udp net.PacketConn
	tcp net.Listener
}

func (r *room) close() {
	if r.conn != nil {
		r.conn.Close()
	}
	if r.udp != nil {
		closeSockets(r.udp, r.tcp)
	}
	r.ns.Close()
}

// roomKind is what a namespace is prepared for.
type roomKind struct{ six, dns bool }

func (s Sandbox) kind() roomKind {
	return roomKind{six: s.Gateway6.IsValid() || slices.ContainsFunc(s.Legs, func(l Leg) bool { return l.Addr6.IsValid() }), dns: s.DNS}
}

// roomPool keeps new namespaces ready, of each kind after the first container asked for one of that kind.
type roomPool struct {
	mu     sync.Mutex
	ready  map[roomKind][]*room
	timer  *time.Timer // of the refill that is due, nil without
	closed bool
	work   sync.WaitGroup
}

// take returns a ready namespace, or nil, and has it replaced a moment later.
func (p *roomPool) take(k roomKind) *room {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil
	}
	if p.timer == nil {
		p.work.Add(1)
		p.timer = time.AfterFunc(refillDelay, p.refill)
	}
	if p.ready == nil {
		p.ready = map[roomKind][]*room{}
	}
	n := len(p.ready[k])
	if n == 0 {
		p.ready[k] = nil // wanted from now on
		return nil
	}
	r := p.ready[k][n-1]
	p.ready[k] = p.ready[k][:n-1]
	return r
}

// refill makes as many as are missing. A failure is not told here: the next container makes its own and says why it could not.
func (p *roomPool) refill() {
	defer p.work.Done()
	for {
		p.mu.Lock()
		k, missing := p.missing()
		if !missing {
			p.timer = nil
		}
		p.mu.Unlock()
		if !missing {
			return
		}
		r, err := newRoom(k)
		p.mu.Lock()
		if err != nil {
			p.timer = nil
			p.mu.Unlock()
			return
		}
		p.ready[k] = append(p.ready[k], r)
		p.mu.Unlock()
	}
}

// missing returns the kind of which there are the fewest, if they are too few. The caller holds mu.
func (p *roomPool) missing() (least roomKind, missing bool) {
	fewest := readyNamespaces
	for k, rooms := range p.ready {
		if !p.closed && len(rooms) < fewest {
			least, fewest, missing = k, len(rooms), true
		}
	}
	return least, missing
}

// close lets go of all.
func (p *roomPool) close() {
	p.mu.Lock()
	p.closed = true
	if p.timer != nil && p.timer.Stop() {
		p.timer = nil
		p.work.Done()
	}
	p.mu.Unlock()
	p.work.Wait()
	for _, rooms := range p.ready {
		for _, r := range rooms {
			r.close()
		}
	}
	p.ready = nil
}

func newRoom(k roomKind) (*room, error) {
	ns, err := link.NewNS()
	if err != nil {
		return nil, err
	}
	r := &room{ns: ns, fresh: true}
	if r.conn, err = link.Dial(ns); err == nil {
		err = r.setUp(k.six)
	}
	if err == nil && k.dns {
		r.udp, r.tcp, err = openDNS(ns)
	}
	if err != nil {
		r.close()
		return nil, err
	}
	return r, nil
}

// setUp sets what all containers have; with six false devices have no IPv6, so that there is no link-local chatter.
func (r *room) setUp(six bool) error {
	set := map[string]string{"ipv4/conf/all/accept_redirects": "0", "ipv4/conf/default/accept_redirects": "0", "ipv6/conf/default/disable_ipv6?": "1",
		"ipv6/conf/default/accept_ra?": "0"} // or whoever shares a network with it could route its traffic
	if six {
		set["ipv6/conf/default/disable_ipv6?"] = "0"
	}
	if err := r.ns.Sysctl(set); err != nil {
		return err
	}
	return r.conn.Do([]link.Message{link.Up(loopback)})
}

// links lists the devices of a sandbox's namespace, after setting up what an attempt before left undone.
func (r *room) links(s Sandbox) (map[string]link.Link, error) {
	if r.fresh {
		return map[string]link.Link{"lo": {Index: loopback, Name: "lo", Up: true}}, nil
	}
	links, err := r.conn.Links()
	if six := s.kind().six; err == nil && (!links["lo"].Up || six && len(links) == 1) {
		err = r.setUp(six)
	}
	return links, err
}

// room opens the namespace of a sandbox, or makes one.
func (d *Driver) room(s Sandbox) (*room, error) {
	path := d.sandboxFile(s.ID)
	ns, err := link.OpenNS(path)
	if err == nil {
		r := &room{ns: ns}
		if r.conn, err = link.Dial(ns); err != nil {
			r.close()
			return nil, err
		}
		return r, nil
	}
	r := d.rooms.take(s.kind())
	if r == nil {
		if r, err = newRoom(roomKind{six: s.kind().six}); err != nil {
			return nil, err
		}
	}
	if err := r.ns.Mount(path); err != nil {
		r.close()
		return nil, err
	}
	return r, nil
}
