package agent_test

import (
	"context"
	"fmt"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"skein/agent"
	"skein/agent/tasktest"
	"skein/manager/api"
)

type stream = grpc.BidiStreamingServer[api.AgentMessage, api.ManagerMessage]

// managers are scripted dispatchers by address.
type managers struct {
	api.UnimplementedDispatcherServer
	t      *testing.T
	script map[string]func(s stream, hello *api.Hello) error
	mu     sync.Mutex
	asked  []string
	lis    map[string]*bufconn.Listener
	srvs   []*grpc.Server
}

type one struct {
	api.UnimplementedDispatcherServer
	m    *managers
	addr string
}

func (o one) Session(s stream) error {
	o.m.mu.Lock()
	o.m.asked = append(o.m.asked, o.addr)
	o.m.mu.Unlock()
	first, err := s.Recv()
	if err != nil {
		return err
	}
	return o.m.script[o.addr](s, first.GetHello())
}

// start runs an agent against scripted managers until f returns.
func start(t *testing.T, script map[string]func(s stream, hello *api.Hello) error, seeds []string, f func(a *agent.Agent, m *managers, exec *tasktest.Executor)) {
	synctest.Test(t, func(t *testing.T) {
		m := &managers{t: t, script: script, lis: map[string]*bufconn.Listener{}}
		for addr := range script {
			m.lis[addr] = bufconn.Listen(1 << 16)
			srv := grpc.NewServer()
			api.RegisterDispatcherServer(srv, one{m: m, addr: addr})
			m.srvs = append(m.srvs, srv)
			go srv.Serve(m.lis[addr])
		}
		exec := tasktest.NewExecutor()
		a, err := agent.New(agent.Config{
			NodeID: "n1", StateDir: t.TempDir(), Seeds: seeds, Executor: exec, Network: tasktest.NewNetwork(),
			Dial: func(_ context.Context, addr string) (*grpc.ClientConn, error) {
				return grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(insecure.NewCredentials()),
					grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) { return m.lis[addr].DialContext(ctx) }))
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan struct{})
		go func() { defer close(done); _ = a.Run(ctx) }()
		f(a, m, exec)
		cancel()
		<-done
		for _, s := range m.srvs {
			s.Stop()
		}
	})
}

func welcome(s stream) error {
	return s.Send(&api.ManagerMessage{Kind: &api.ManagerMessage_Welcome{Welcome: &api.Welcome{SessionId: "s", HeartbeatMillis: 1000, LeaseMillis: 4000, NodeIndex: 1}}})
}

func send(s stream, u *api.AssignmentUpdate) error {
	return s.Send(&api.ManagerMessage{Kind: &api.ManagerMessage_Assignments{Assignments: u}})
}

// listen answers heartbeats and collects what else comes.
func listen(s stream, each func(*api.AgentMessage)) error {
	for {
		m, err := s.Recv()
		if err != nil {
			return err
		}
		if h := m.GetHeartbeat(); h != nil {
			if err := s.Send(&api.ManagerMessage{Kind: &api.ManagerMessage_Heartbeat{Heartbeat: &api.HeartbeatReply{Sequence: h.Sequence}}}); err != nil {
				return err
			}
		}
		each(m)
	}
}

func TestFollowerNamesTheLeader(t *testing.T) {
	script := map[string]func(stream, *api.Hello) error{
		"follower": func(s stream, _ *api.Hello) error {
			s.SetTrailer(metadata.Pairs("skein-leader", "leader"))
			return status.Error(codes.FailedPrecondition, "not the leader")
		},
		"leader": func(s stream, _ *api.Hello) error {
			if err := welcome(s); err != nil {
				return err
			}
			return listen(s, func(*api.AgentMessage) {})
		},
	}
	start(t, script, []string{"follower"}, func(a *agent.Agent, m *managers, _ *tasktest.Executor) {
		time.Sleep(10 * time.Millisecond)
		if s := a.Status(); !s.Connected || s.Leader != "leader" {
			t.Errorf("status %+v", s)
		}
		time.Sleep(time.Minute)
		if s := a.Status(); !s.Connected || len(m.asked) != 2 {
			t.Errorf("after a minute: status %+v, asked %v", s, m.asked)
		}
	})
}

func TestRedirectsInACircleEnd(t *testing.T) {
	point := func(to string) func(stream, *api.Hello) error {
		return func(s stream, _ *api.Hello) error {
			s.SetTrailer(metadata.Pairs("skein-leader", to))
			return status.Error(codes.FailedPrecondition, "not the leader")
		}
	}
	start(t, map[string]func(stream, *api.Hello) error{"a": point("b"), "b": point("a")}, []string{"a", "b"}, func(_ *agent.Agent, m *managers, _ *tasktest.Executor) {
		time.Sleep(time.Minute)
		m.mu.Lock()
		defer m.mu.Unlock()
		if n := len(m.asked); n > 300 || n < 10 {
			t.Errorf("asked %d times in a minute", n)
		}
	})
}

func TestSilentManagerIsLeft(t *testing.T) {
	silent := 0
	script := map[string]func(stream, *api.Hello) error{
		"frozen": func(s stream, _ *api.Hello) error {
			silent++
			if err := welcome(s); err != nil {
				return err
			}
			<-s.Context().Done()
			return nil
		},
	}
	start(t, script, []string{"frozen"}, func(a *agent.Agent, m *managers, _ *tasktest.Executor) {
		time.Sleep(9 * time.Second)
		m.mu.Lock()
		defer m.mu.Unlock()
		if silent != 3 {
			t.Errorf("%d sessions in 9 s, want one per lease of 4 s", silent)
		}
	})
}

// A node whose link was cut takes the leader's word again as soon as a manager names it, though the leader was silent just now.
func TestHealedLinkSparesNobody(t *testing.T) {
	var mu sync.Mutex
	var session time.Time
	cut := true
	hears := func() bool {
		mu.Lock()
		defer mu.Unlock()
		return !cut
	}
	follower := func(s stream, _ *api.Hello) error {
		if !hears() {
			<-s.Context().Done()
			return s.Context().Err()
		}
		s.SetTrailer(metadata.Pairs("skein-leader", "leader"))
		return status.Error(codes.FailedPrecondition, "not the leader")
	}
	script := map[string]func(stream, *api.Hello) error{"a": follower, "b": follower, "leader": func(s stream, _ *api.Hello) error {
		if !hears() {
			<-s.Context().Done()
			return s.Context().Err()
		}
		mu.Lock()
		session = time.Now()
		mu.Unlock()
		if err := welcome(s); err != nil {
			return err
		}
		return listen(s, func(*api.AgentMessage) {})
	}}
	start(t, script, []string{"a", "b", "leader"}, func(_ *agent.Agent, m *managers, _ *tasktest.Executor) {
		time.Sleep(60*time.Second + 300*time.Millisecond)
		mu.Lock()
		cut = false
		mu.Unlock()
		healed := time.Now()
		time.Sleep(20 * time.Second)
		mu.Lock()
		defer mu.Unlock()
		// An attempt that was under way (1 s), a pause (1 s), and one redirect.
		if took := session.Sub(healed); session.IsZero() || took > 2200*time.Millisecond {
			t.Errorf("session %v after the link was healed", took)
		}
	})
}

// A link that is healed as soon as the node noticed that it was cut: the other managers never were silent.
func TestShortCutSparesNobody(t *testing.T) {
	var mu sync.Mutex
	var sessions []time.Time
	cut := false
	hears := func() bool {
		mu.Lock()
		defer mu.Unlock()
		return !cut
	}
	follower := func(s stream, _ *api.Hello) error {
		s.SetTrailer(metadata.Pairs("skein-leader", "leader"))
		return status.Error(codes.FailedPrecondition, "not the leader")
	}
	script := map[string]func(stream, *api.Hello) error{"a": follower, "b": follower, "leader": func(s stream, _ *api.Hello) error {
		mu.Lock()
		sessions = append(sessions, time.Now())
		mu.Unlock()
		if err := welcome(s); err != nil {
			return err
		}
		for {
			m, err := s.Recv()
			if err != nil {
				return err
			}
			if h := m.GetHeartbeat(); h != nil && hears() {
				if err := s.Send(&api.ManagerMessage{Kind: &api.ManagerMessage_Heartbeat{Heartbeat: &api.HeartbeatReply{Sequence: h.Sequence}}}); err != nil {
					return err
				}
			}
		}
	}}
	start(t, script, []string{"a", "b", "leader"}, func(_ *agent.Agent, m *managers, _ *tasktest.Executor) {
		time.Sleep(10 * time.Second)
		mu.Lock()
		cut = true
		mu.Unlock()
		time.Sleep(3900 * time.Millisecond) // less than the lease
		mu.Lock()
		cut = false
		before := len(sessions)
		mu.Unlock()
		healed := time.Now()
		time.Sleep(20 * time.Second)
		mu.Lock()
		defer mu.Unlock()
		if len(sessions) > before+1 {
			t.Errorf("%d sessions after the link was healed", len(sessions)-before)
		}
		if len(sessions) > before && sessions[before].Sub(healed) > 2*time.Second {
			t.Errorf("session %v after the link was healed", sessions[before].Sub(healed))
		}
	})
}

func TestGapBeginsANewSession(t *testing.T) {
	var hellos []*api.Hello
	script := map[string]func(stream, *api.Hello) error{
		"m": func(s stream, h *api.Hello) error {
			hellos = append(hellos, h)
			if err := welcome(s); err != nil {
				return err
			}
			a := &api.Assignment{TaskId: "t1", Desired: uint32(api.TaskRunning), State: uint32(api.TaskAssigned)}
			if err := send(s, &api.AssignmentUpdate{Sequence: 1, Full: true, Set: []*api.Assignment{a}}); err != nil {
				return err
			}
			if len(hellos) == 1 {
				time.Sleep(time.Second)
				if err := send(s, &api.AssignmentUpdate{Sequence: 3, Removed: []string{"t1"}}); err != nil {
					return err
				}
			}
			return listen(s, func(*api.AgentMessage) {})
		},
	}
	start(t, script, []string{"m"}, func(a *agent.Agent, m *managers, exec *tasktest.Executor) {
		time.Sleep(5 * time.Second)
		if len(hellos) != 2 || !a.Status().Connected {
			t.Fatalf("%d hellos, status %+v", len(hellos), a.Status())
		}
		if got := hellos[1].Statuses; len(got) != 1 || api.TaskState(got[0].State) != api.TaskRunning {
			t.Errorf("second hello says %v", got)
		}
		if exec.Starts("t1") != 1 || len(exec.Running()) != 1 {
			t.Errorf("started %d times, running %v", exec.Starts("t1"), exec.Running())
		}
	})
}

func TestReportsAreBatched(t *testing.T) {
	const n = 2500
	var mu sync.Mutex
	batches, latest := 0, map[string]uint32{}
	script := map[string]func(stream, *api.Hello) error{
		"m": func(s stream, _ *api.Hello) error {
			if err := welcome(s); err != nil {
				return err
			}
			u := &api.AssignmentUpdate{Sequence: 1, Full: true}
			for i := range n {
				u.Set = append(u.Set, &api.Assignment{TaskId: fmt.Sprint("t", i), Desired: uint32(api.TaskRunning), State: uint32(api.TaskAssigned)})
			}
			if err := send(s, u); err != nil {
				return err
			}
			return listen(s, func(m *api.AgentMessage) {
				b := m.GetStatuses()
				if b == nil {
					return
				}
				mu.Lock()
				defer mu.Unlock()
				batches++
				if len(b.Reports) > api.MaxStatusReports {
					t.Errorf("batch of %d", len(b.Reports))
				}
				for _, r := range b.Reports {
					latest[r.TaskId] = r.State
				}
			})
		},
	}
	start(t, script, []string{"m"}, func(*agent.Agent, *managers, *tasktest.Executor) {
		time.Sleep(2 * time.Second)
		mu.Lock()
		defer mu.Unlock()
		if len(latest) != n || batches > 30 {
			t.Errorf("%d tasks reported in %d batches", len(latest), batches)
		}
		for id, st := range latest {
			if api.TaskState(st) != api.TaskRunning {
				t.Fatalf("%s ended as %s", id, api.TaskState(st))
			}
		}
	})
}

// Managers without a leader say how long the attempts of all agents should spread: the first ones do already.
func TestAgentsSpreadAsManagersSay(t *testing.T) {
	lost := func(s stream, _ *api.Hello) error {
		s.SetTrailer(metadata.Pairs("skein-spread-millis", "4000"))
		return status.Error(codes.FailedPrecondition, "not the leader")
	}
	start(t, map[string]func(stream, *api.Hello) error{"follower": lost}, []string{"follower"}, func(_ *agent.Agent, m *managers, _ *tasktest.Executor) {
		time.Sleep(time.Minute)
		if n := len(m.asked); n < 15 || n > 60 {
			t.Errorf("asked %d times in a minute, want about 29", n)
		}
	})
}
