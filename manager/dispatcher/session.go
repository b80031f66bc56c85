package dispatcher

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"

	"skein/manager/api"
	"skein/manager/store"
)

const (
	// queueBound and queueBytes are how much may wait for a slow agent: more than a full start on a node with a thousand networks.
	queueBound = 4096
	queueBytes = 64 << 20
	// stillHere is how often a node whose session waits for its turn hears that the manager lives.
	stillHere = time.Second
	// maxText bounds messages and errors of reports, which go into the log.
	maxText      = 4 << 10
	maxHelloAcks = 1 << 16
)

// session is one agent's stream. Its queue is bounded: an agent that does not read loses the session, not the manager's memory.
type session struct {
	id   string
	node string
	wake chan struct{} // poked when there is something to send

	mu    sync.Mutex
	queue []*api.ManagerMessage
	bytes int

	hello atomic.Bool // was said

	once sync.Once
	gone chan struct{} // closed by end
	err  error

	// Owned by Run.
	welcomed  *store.Node // the record that the agent was told
	greeted   bool
	sequence  uint64
	networks  map[string]uint64 // version of each network's record that was sent
	templates map[*template]int // what the agent holds, and of how many tasks sent
	deps      map[string]int    // secrets and configs that the agent holds: how many of the templates need each
	tables    map[string]bool   // tables this agent holds in their newest version
	holds     map[string]uint64 // digests of the tables that it held at its beginning
}

func newSession(node string) *session {
	return &session{
		id: api.NewID(), node: node, wake: make(chan struct{}, 1), gone: make(chan struct{}),
		networks: map[string]uint64{}, templates: map[*template]int{}, deps: map[string]int{}, tables: map[string]bool{},
	}
}

// end ends the session with a reason; the first one counts.
func (s *session) end(err error) {
	s.once.Do(func() {
		s.err = err
		close(s.gone)
	})
}

// push queues a message of about so many bytes, or ends the session when the agent is too slow.
func (s *session) push(m *api.ManagerMessage, size int) {
	s.mu.Lock()
	full := len(s.queue) >= queueBound || s.bytes > queueBytes
	if !full {
		s.queue = append(s.queue, m)
		s.bytes += size
	}
	s.mu.Unlock()
	if full {
		s.end(api.Errorf(errdefs.ErrResourceExhausted, "node %s is too slow: %d messages or %d MiB wait for it", s.node, queueBound, queueBytes>>20))
		return
	}
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// take empties the queue.
func (s *session) take() []*api.ManagerMessage {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := s.queue
	s.queue, s.bytes = nil, 0
	return out
}

// Session serves one agent.
func (d *Dispatcher) Session(stream sessionStream) error {
	ctx := stream.Context()
	id, err := d.cfg.Identify(ctx)
	if err != nil {
		return err
	}
	s := newSession(id)
	if err := d.receiveNode(s); err != nil {
		return err
	}
	registered := make(chan struct{})
	go func() { // ends with the stream's context, when this method has returned
		s.end(d.receive(ctx, stream, s, registered))
		_ = d.do(context.WithoutCancel(ctx), func() { d.leave(s) })
	}()
	hello := time.NewTimer(helloBound)
	defer hello.Stop()
	waiting := time.NewTicker(stillHere) // the agent must not give this manager up while it waits for its turn
	defer waiting.Stop()
	for {
		select {
		case <-s.gone:
			return s.err
		case <-ctx.Done():
			return ctx.Err()
		case <-registered:
			hello.Stop()
			waiting.Stop()
			registered = nil
		case <-waiting.C:
			s.push(heartbeatReply(0), 0)
		case <-hello.C:
			if !s.hello.Load() {
				s.end(api.Errorf(errdefs.ErrInvalidArgument, "node %s said no hello within %v", id, helloBound))
			}
		case <-s.wake:
			for _, m := range s.take() {
				if err := stream.Send(m); err != nil {
					s.end(err)
					return err
				}
			}
		}
	}
}

// receiveNode welcomes a node that is part of the cluster at once, so that it stays while others come before it.
func (d *Dispatcher) receiveNode(s *session) (err error) {
	d.cfg.Store.View(func(tx store.ReadTx) {
		rec := tx.Node(s.node)
		if rec == nil {
			err = errNotMember(s.node)
			return
		}
		d.sayWelcome(tx, s, rec)
	})
	return err
}

func errNotMember(id string) error {
	return api.Errorf(errdefs.ErrPermissionDenied, "node %s is not part of this cluster: it was removed; let it leave and join again", id)
}

func heartbeatReply(sequence uint64) *api.ManagerMessage {
	return &api.ManagerMessage{Kind: &api.ManagerMessage_Heartbeat{Heartbeat: &api.HeartbeatReply{Sequence: sequence}}}
}

// receive reads the agent's messages until the stream ends.
func (d *Dispatcher) receive(ctx context.Context, stream sessionStream, s *session, registered chan<- struct{}) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	hello := first.GetHello()
	if hello == nil {
		return api.Errorf(errdefs.ErrInvalidArgument, "node %s: the first message of a session must be a hello", s.node)
	}
	if len(hello.DescriptionJson) > api.MaxSpecBytes || len(hello.Acks) > maxHelloAcks {
		return api.Errorf(errdefs.ErrInvalidArgument, "node %s: hello is too large: description %d bytes (at most %d), %d acks (at most %d)",
			s.node, len(hello.DescriptionJson), api.MaxSpecBytes, len(hello.Acks), maxHelloAcks)
	}
	s.hello.Store(true)
	var n *node
	if err := d.call(ctx, func() { n, err = d.register(s, hello) }); err != nil {
		return err
	}
	if err != nil {
		return err
	}
	close(registered)
	for {
		m, err := stream.Recv()
		if err != nil {
			return err
		}
		n.seen.Store(time.Now().UnixNano())
		if err := d.take(ctx, s, n, m); err != nil {
			return err
		}
	}
}

// take handles one message of a registered agent.
func (d *Dispatcher) take(ctx context.Context, s *session, n *node, m *api.AgentMessage) error {
	switch k := m.Kind.(type) {
	case *api.AgentMessage_Heartbeat:
		s.push(heartbeatReply(k.Heartbeat.Sequence), 0)
		return nil
	case *api.AgentMessage_Statuses:
		if len(k.Statuses.Reports) > api.MaxStatusReports {
			return api.Errorf(errdefs.ErrInvalidArgument, "node %s: batch of %d reports, at most %d are taken", s.node, len(k.Statuses.Reports), api.MaxStatusReports)
		}
		return d.do(ctx, func() {
			if n.session == s {
				d.intake(n, k.Statuses.Reports)
			}
		})
	case *api.AgentMessage_Ack:
		return d.do(ctx, func() {
			if n.session == s {
				d.ack(n, k.Ack)
			}
		})
	case *api.AgentMessage_Tls:
		return d.do(ctx, func() {
			if n.session == s {
				d.noteTLS(n, k.Tls)
			}
		})
	case *api.AgentMessage_Addrs:
		return d.do(ctx, func() {
			if n.session == s && validAddrs(k.Addrs) {
				d.writer.said(n.id, &api.Hello{Addrs: k.Addrs})
			}
		})
	case *api.AgentMessage_Crypt:
		return d.do(ctx, func() {
			if n.session == s {
				d.noteCrypt(n, k.Crypt)
			}
		})
	case *api.AgentMessage_Facts:
		if err := checkFacts(n.id, k.Facts); err != nil {
			return err
		}
		return d.do(ctx, func() {
			if n.session == s {
				d.noteFacts(n, k.Facts)
			}
		})
	case *api.AgentMessage_Goodbye:
		return d.do(ctx, func() {
			if n.session == s {
				d.goodbye(n)
			}
		})
	case *api.AgentMessage_Hello:
		return api.Errorf(errdefs.ErrInvalidArgument, "node %s: second hello in one session", s.node)
	}
	return nil // a kind of a newer agent
}
