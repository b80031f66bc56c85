package agent_test

import (
	"context"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"skein/agent"
	"skein/agent/tasktest"
	"skein/manager/api"
)

// A node that leaves says so in its session, or in the next, and begins no other.
func TestLeaveSaysGoodbye(t *testing.T) {
	for name, before := range map[string]time.Duration{"in a session": time.Second, "before the first": 0} {
		t.Run(name, func(t *testing.T) {
			heard := 0
			start(t, map[string]func(s stream, hello *api.Hello) error{"m1": func(s stream, _ *api.Hello) error {
				if err := welcome(s); err != nil {
					return err
				}
				for {
					m, err := s.Recv()
					if err != nil {
						return err
					}
					if m.GetGoodbye() != nil {
						heard++
						return status.Error(codes.Unavailable, "the node left")
					}
				}
			}}, []string{"m1"}, func(a *agent.Agent, m *managers, _ *tasktest.Executor) {
				time.Sleep(before)
				ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
				defer cancel()
				if err := a.Leave(ctx); err != nil {
					t.Error(err)
				}
				time.Sleep(time.Minute)
				m.mu.Lock()
				defer m.mu.Unlock()
				if heard != 1 || len(m.asked) != 1 {
					t.Errorf("goodbye was heard %d times in %d sessions", heard, len(m.asked))
				}
			})
		})
	}
}
