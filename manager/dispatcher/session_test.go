package dispatcher

import (
	"testing"

	"github.com/containerd/errdefs"

	"skein/manager/api"
)

func TestSlowAgentLosesItsSession(t *testing.T) {
	s := newSession("w1")
	for range queueBound {
		s.push(&api.ManagerMessage{}, 0)
	}
	select {
	case <-s.gone:
		t.Fatal("ended within its bound")
	default:
	}
	s.push(&api.ManagerMessage{}, 0)
	select {
	case <-s.gone:
	default:
		t.Fatal("not ended beyond its bound")
	}
	if !errdefs.IsResourceExhausted(s.err) {
		t.Errorf("reason: %v", s.err)
	}
}
