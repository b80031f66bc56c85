package c1m

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	"skein/manager/api"
)

const (
	reportEvery = 50 * time.Millisecond  // as the product's agent
	retryMin    = 100 * time.Millisecond // between rounds over the managers, with jitter below a bound that doubles
	retryFirst  = time.Second
	retryMax    = 4 * time.Second // as the product: a new leader gives a node up after 5 s
	maxMessage  = 64 << 20
)

// agent is a simulated node: a real session, containers that exist in a map.
type agent struct {
	f      *fleet
	number int
	id     string
	wake   chan struct{}

	mu       sync.Mutex
	tasks    map[string]*container
	dirty    []string // to be reported, oldest first
	steps    []step   // in the order of their time
	sequence uint64
	acks     map[string]uint64
	unacked  map[string]bool
	broken   []string // rules of the protocol that the managers broke
}

// container is a simulated one.
type container struct {
	state  api.TaskState
	starts uint8
	listed bool // in dirty
}

// step is a container's next change of state.
type step struct {
	at   time.Time
	task string
}

func newAgent(f *fleet, number int) *agent {
	return &agent{f: f, number: number, wake: make(chan struct{}, 1), tasks: map[string]*container{}, acks: map[string]uint64{}, unacked: map[string]bool{}}
}

// run keeps a session with the leader until ctx ends.
func (a *agent) run(ctx context.Context) {
	limit := retryFirst
	for ctx.Err() == nil {
		members := a.f.c.members()
		rand.Shuffle(len(members), func(i, j int) { members[i], members[j] = members[j], members[i] })
		for _, m := range members {
			had, err := a.session(ctx, m)
			if ctx.Err() != nil {
				return
			}
			if had {
				a.f.lost(err)
				limit = retryFirst
				break
			}
		}
		select {
		case <-ctx.Done():
		case <-time.After(retryMin + rand.N(limit)):
		}
		limit = min(2*limit, retryMax)
	}
}

// session lasts as long as the manager has this node.
func (a *agent) session(ctx context.Context, m *member) (had bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	conn, err := dial(m.door, a.f.c.book, a.number)
	if err != nil {
		return false, err
	}
	defer conn.Close()
	stream, err := api.NewDispatcherClient(conn).Session(ctx, grpc.MaxCallRecvMsgSize(maxMessage))
	if err != nil {
		return false, err
	}
	_ = stream.Send(&api.AgentMessage{Kind: &api.AgentMessage_Hello{Hello: a.hello()}}) // a refusal shows at Recv
	first, err := stream.Recv()
	if err != nil {
		return false, err
	}
	w := first.GetWelcome()
	if w == nil {
		return false, errors.New("no welcome")
	}
	a.f.connected()
	received := make(chan error, 1)
	go func() {
		received <- a.receive(stream)
		cancel()
	}()
	err = a.send(ctx, stream, time.Duration(w.HeartbeatMillis)*time.Millisecond)
	cancel()
	if rerr := <-received; status.Code(rerr).String() != "Canceled" {
		err = rerr
	}
	return true, err
}

type sessionStream = grpc.BidiStreamingClient[api.AgentMessage, api.ManagerMessage]

// hello says what runs here.
func (a *agent) hello() *api.Hello {
	a.mu.Lock()
	defer a.mu.Unlock()
	h := &api.Hello{Hostname: hostname(a.number), DescriptionJson: a.f.description, UnderlayAddr: underlay(a.number), RpcAddr: underlay(a.number) + ":1"}
	a.dirty = nil
	for id, c := range a.tasks {
		c.listed = false
		h.Statuses = append(h.Statuses, a.reportLocked(id, c))
	}
	for t, v := range a.acks {
		h.Acks = append(h.Acks, &api.TableAck{Table: t, Version: v})
	}
	clear(a.unacked)
	return h
}

func (a *agent) reportLocked(id string, c *container) *api.TaskReport {
	r := &api.TaskReport{TaskId: id, State: uint32(c.state), Time: time.Now().UnixNano(), NodeId: a.id, Message: "preparing"}
	if c.state >= api.TaskRunning {
		r.Message, r.ContainerId, r.Pid = "started", containerID(id), int32(len(a.tasks))
		if c.state > api.TaskRunning {
			r.Message = c.state.String()
		}
	}
	return r
}

func (a *agent) receive(stream sessionStream) error {
	for {
		m, err := stream.Recv()
		if err != nil {
			return err
		}
		switch k := m.Kind.(type) {
		case *api.ManagerMessage_Assignments:
			a.assign(k.Assignments)
		case *api.ManagerMessage_Table:
			a.mu.Lock()
			a.acks[k.Table.Table], a.unacked[k.Table.Table] = k.Table.Version, true
			a.mu.Unlock()
			a.poke()
		}
	}
}

func (a *agent) poke() {
	select {
	case a.wake <- struct{}{}:
	default:
	}
}

// assign takes a message of assignments.
func (a *agent) assign(u *api.AssignmentUpdate) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !u.Full && u.Sequence != a.sequence+1 {
		a.broken = append(a.broken, "a message of assignments is missing")
	}
	a.sequence = u.Sequence
	if u.Full {
		wanted := make(map[string]bool, len(u.Set))
		for _, x := range u.Set {
			wanted[x.TaskId] = true
		}
		for id := range a.tasks {
			if !wanted[id] {
				a.removeLocked(id)
			}
		}
	}
	for _, x := range u.Set {
		a.wantLocked(x)
	}
	for _, id := range u.Removed {
		a.removeLocked(id)
	}
	a.poke()
}

func (a *agent) wantLocked(x *api.Assignment) {
	if x.NodeId != a.id {
		a.broken = append(a.broken, "task "+x.TaskId+" of another node")
	}
	c := a.tasks[x.TaskId]
	stop := api.TaskState(x.Desired) >= api.TaskShutdown
	switch {
	case c == nil && stop:
	case c == nil:
		if api.TaskState(x.State) >= api.TaskRunning {
			a.broken = append(a.broken, "task "+x.TaskId+" runs somewhere else")
		}
		c = &container{state: api.TaskPreparing}
		a.tasks[x.TaskId] = c
		a.steps = append(a.steps, step{time.Now().Add(a.f.o.prepare + a.f.o.start), x.TaskId})
		a.listLocked(x.TaskId, c)
	case stop && c.state <= api.TaskRunning:
		if c.state == api.TaskRunning {
			a.f.running.Add(-1)
		}
		c.state = api.TaskShutdown
		a.listLocked(x.TaskId, c)
	}
}

func (a *agent) removeLocked(id string) {
	if c := a.tasks[id]; c != nil {
		if c.state == api.TaskRunning {
			a.f.running.Add(-1)
			a.f.removed.Add(1)
		}
		delete(a.tasks, id)
	}
}

func (a *agent) listLocked(id string, c *container) {
	if !c.listed {
		c.listed = true
		a.dirty = append(a.dirty, id)
	}
}

// advance starts what is due and returns when the next container is.
func (a *agent) advance(now time.Time) (next time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	n := 0
	for n < len(a.steps) && !a.steps[n].at.After(now) {
		id := a.steps[n].task
		n++
		if c := a.tasks[id]; c != nil && c.state < api.TaskRunning {
			c.state = api.TaskRunning
			c.starts++
			a.f.running.Add(1)
			a.listLocked(id, c)
		}
	}
	if a.steps = a.steps[n:]; len(a.steps) == 0 {
		a.steps = nil
		return time.Time{}
	}
	return a.steps[0].at
}

// batch is what there is to report.
func (a *agent) batch() []*api.AgentMessage {
	a.mu.Lock()
	defer a.mu.Unlock()
	var out []*api.AgentMessage
	for len(a.dirty) > 0 {
		n := min(len(a.dirty), api.MaxStatusReports)
		b := &api.StatusBatch{}
		for _, id := range a.dirty[:n] {
			if c := a.tasks[id]; c != nil {
				c.listed = false
				b.Reports = append(b.Reports, a.reportLocked(id, c))
			}
		}
		a.dirty = a.dirty[n:]
		out = append(out, &api.AgentMessage{Kind: &api.AgentMessage_Statuses{Statuses: b}})
	}
	a.dirty = nil
	for t := range a.unacked {
		out = append(out, &api.AgentMessage{Kind: &api.AgentMessage_Ack{Ack: &api.TableAck{Table: t, Version: a.acks[t]}}})
	}
	clear(a.unacked)
	return out
}

// send reports and beats until the session ends.
func (a *agent) send(ctx context.Context, stream sessionStream, every time.Duration) error {
	beat := time.NewTimer(rand.N(every) + 1)
	defer beat.Stop()
	hold := time.NewTimer(0)
	defer hold.Stop()
	var sent time.Time
	var sequence uint64
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-beat.C:
			beat.Reset(every)
			sequence++
			if err := stream.Send(&api.AgentMessage{Kind: &api.AgentMessage_Heartbeat{Heartbeat: &api.Heartbeat{Sequence: sequence}}}); err != nil {
				return err
			}
		case <-a.wake:
			hold.Reset(max(0, reportEvery-time.Since(sent)))
		case <-hold.C:
			now := time.Now()
			next := a.advance(now)
			for _, m := range a.batch() {
				sent = now
				if err := stream.Send(m); err != nil {
					return err
				}
			}
			if !next.IsZero() {
				hold.Reset(max(time.Until(next), reportEvery))
			}
		}
	}
}
