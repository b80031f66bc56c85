package dispatcher

import (
	"context"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"skein/manager/api"
)

const (
	// queueBound is how many messages may wait for a slow agent: more than a full start on a node with a thousand networks.
	queueBound = 4096
	// maxText bounds messages and errors of reports, which go into the log.
	maxText      = 4 << 10
	maxHelloAcks = 1 << 16
)

// session is one agent's stream. Its queue is bounded: an agent that does not read loses the session, not the manager's memory.
type session struct {
	id   string
	node string
	out  chan *api.ManagerMessage

	once sync.Once
	gone chan struct{} // closed by end
	err  error

	// Owned by Run.
	sequence uint64
	sent     map[string]sentTask
	networks map[string]uint64   // version of each network's record that was sent
	needs    map[string][]string // secrets and configs of each sent task that has some
	deps     map[string]int      // secrets and configs that the agent holds: how many of the sent tasks need each
	tables   map[string]bool     // tables this agent holds in their newest version
}

func newSession(node string) *session {
	return &session{
		id: api.NewID(), node: node, out: make(chan *api.ManagerMessage, queueBound), gone: make(chan struct{}),
		sent: map[string]sentTask{}, networks: map[string]uint64{}, needs: map[string][]string{}, deps: map[string]int{}, tables: map[string]bool{},
	}
}

// end ends the session with a reason; the first one counts.
func (s *session) end(err error) {
	s.once.Do(func() {
		s.err = err
		close(s.gone)
	})
}

// push queues a message, or ends the session when the agent is too slow.
func (s *session) push(m *api.ManagerMessage) {
	select {
	case s.out <- m:
	default:
		s.end(api.Errorf(errdefs.ErrResourceExhausted, "node %s is too slow: %d messages wait for it", s.node, queueBound))
	}
}

// Session serves one agent.
func (d *Dispatcher) Session(stream sessionStream) error {
	ctx := stream.Context()
	id, err := d.cfg.Identify(ctx)
	if err != nil {
		return err
	}
	s := newSession(id)
	registered := make(chan struct{})
	go func() { // ends with the stream's context, when this method has returned
		s.end(d.receive(ctx, stream, s, registered))
		_ = d.do(context.WithoutCancel(ctx), func() { d.leave(s) })
	}()
	hello := time.NewTimer(helloBound)
	defer hello.Stop()
	for {
		select {
		case <-s.gone:
			return s.err
		case <-ctx.Done():
			return ctx.Err()
		case <-registered:
			hello.Stop()
			registered = nil
		case <-hello.C:
			s.end(api.Errorf(errdefs.ErrInvalidArgument, "node %s said no hello within %v", id, helloBound))
		case m := <-s.out:
			if err := stream.Send(m); err != nil {
				s.end(err)
				return err
			}
		}
	}
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
		s.push(&api.ManagerMessage{Kind: &api.ManagerMessage_Heartbeat{Heartbeat: &api.HeartbeatReply{Sequence: k.Heartbeat.Sequence}}})
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
	case *api.AgentMessage_Hello:
		return api.Errorf(errdefs.ErrInvalidArgument, "node %s: second hello in one session", s.node)
	}
	return nil // a kind of a newer agent
}
