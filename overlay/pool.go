package overlay

import (
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

// room is a new namespace with a connection into it, its loopback up and its kernel parameters set. Until it is mounted it belongs to this
// process alone and is gone with it.
type room struct {
	ns   *link.NS
	conn *link.Conn
}

func (r *room) close() {
	if r.conn != nil {
		r.conn.Close()
	}
	r.ns.Close()
}

// roomPool keeps new namespaces ready. It makes them after the first container asked for one.
type roomPool struct {
	mu     sync.Mutex
	ready  []*room
	timer  *time.Timer // of the refill that is due, nil without
	closed bool
	work   sync.WaitGroup
}

// take returns a ready namespace, or nil, and has it replaced a moment later.
func (p *roomPool) take() *room {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil
	}
	if p.timer == nil {
		p.work.Add(1)
		p.timer = time.AfterFunc(refillDelay, p.refill)
	}
	n := len(p.ready)
	if n == 0 {
		return nil
	}
	r := p.ready[n-1]
	p.ready = p.ready[:n-1]
	return r
}

// refill makes as many as are missing. A failure is not told here: the next container makes its own and says why it could not.
func (p *roomPool) refill() {
	defer p.work.Done()
	for {
		p.mu.Lock()
		full := p.closed || len(p.ready) >= readyNamespaces
		if full {
			p.timer = nil
		}
		p.mu.Unlock()
		if full {
			return
		}
		r, err := newRoom()
		p.mu.Lock()
		if err != nil {
			p.timer = nil
			p.mu.Unlock()
			return
		}
		p.ready = append(p.ready, r)
		p.mu.Unlock()
	}
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
	for _, r := range p.ready {
		r.close()
	}
	p.ready = nil
}

func newRoom() (*room, error) {
	ns, err := link.NewNS()
	if err != nil {
		return nil, err
	}
	r := &room{ns: ns}
	if r.conn, err = link.Dial(ns); err == nil {
		err = setUpRoom(r, false)
	}
	if err != nil {
		r.close()
		return nil, err
	}
	return r, nil
}

// setUpRoom sets what all containers have; with six false devices have no IPv6, so that there is no link-local chatter.
func setUpRoom(r *room, six bool) error {
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

// room opens the namespace of a sandbox, or makes one.
func (d *Driver) room(s Sandbox) (*room, error) {
	path := d.sandboxFile(s.ID)
	ns, err := link.OpenNS(path)
	if err != nil {
		if r := d.rooms.take(); r != nil {
			if err := r.ns.Mount(path); err != nil {
				r.close()
				return nil, err
			}
			return r, nil
		}
		if ns, err = link.CreateNS(path); err != nil {
			return nil, err
		}
	}
	r := &room{ns: ns}
	if r.conn, err = link.Dial(ns); err != nil {
		r.close()
		return nil, err
	}
	return r, nil
}
