package dispatcher

import (
	"math"
	"testing"
	"time"

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

func TestPauseAfterARound(t *testing.T) {
	for _, tt := range []struct {
		name       string
		late, took time.Duration
		told       int
		want       time.Duration
	}{
		{"idle", 0, time.Millisecond, 1, gather},
		{"many told", time.Millisecond, time.Millisecond, 256, 256 * messageCost},
		{"long", 0, time.Second, 1, gatherLimit},
		{"late", 100 * time.Millisecond, time.Millisecond, 256, 400 * time.Millisecond},
		{"very late", time.Minute, time.Second, 256, lateLimit},
		{"before its time", -time.Second, 0, 0, gather},
		{"absurd", math.MaxInt64, 0, 0, lateLimit},
	} {
		if got := pauseAfter(tt.late, tt.took, tt.told); got != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
	}
}
