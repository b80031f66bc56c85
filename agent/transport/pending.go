package transport

import (
	"container/list"
	"net"
	"sync"
)

// pending holds connections at one point of their handshake. When there are too many, of one host or in all, the oldest makes room: a handshake
// takes a good node milliseconds, so that those who open connections and say nothing only drive out each other.
type pending struct {
	mu       sync.Mutex
	max, per int
	order    *list.List // of *waiting, oldest first
	hosts    map[string]*list.List
}

// waiting is one connection and its places in the lists.
type waiting struct {
	conn     net.Conn
	host     string
	all, own *list.Element
}

func newPending(limit, perHost int) *pending {
	return &pending{max: limit, per: perHost, order: list.New(), hosts: map[string]*list.List{}}
}

// add takes a connection in, and closes another one if there is no room.
func (p *pending) add(c net.Conn) *waiting {
	w := &waiting{conn: c, host: hostOf(c.RemoteAddr())}
	p.mu.Lock()
	var out *waiting
	if own := p.hosts[w.host]; own != nil && own.Len() >= p.per {
		out = own.Front().Value.(*waiting)
	} else if p.order.Len() >= p.max {
		out = p.order.Front().Value.(*waiting)
	}
	if out != nil {
		p.drop(out)
	}
	own := p.hosts[w.host]
	if own == nil {
		own = list.New()
		p.hosts[w.host] = own
	}
	w.all, w.own = p.order.PushBack(w), own.PushBack(w)
	p.mu.Unlock()
	if out != nil {
		_ = out.conn.Close()
	}
	return w
}

// done takes a connection out, if it is still there.
func (p *pending) done(w *waiting) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.drop(w)
}

func (p *pending) drop(w *waiting) {
	if w.all == nil {
		return
	}
	p.order.Remove(w.all)
	own := p.hosts[w.host]
	own.Remove(w.own)
	if own.Len() == 0 {
		delete(p.hosts, w.host)
	}
	w.all, w.own = nil, nil
}
