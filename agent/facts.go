package agent

import (
	"context"
	"time"

	"google.golang.org/protobuf/proto"

	"skein/manager/api"
)

// factsEvery is how often the node is looked at for what has changed; managers ask when they must know at once.
const factsEvery = 10 * time.Second

// tellFacts gives out the node's facts: at once, when they have changed, and when they are asked for. It returns when ctx ends, with the session.
func (a *Agent) tellFacts(ctx context.Context, out chan<- *api.NodeFacts) {
	if a.cfg.Facts == nil {
		return
	}
	look := time.NewTicker(factsEvery)
	defer look.Stop()
	var last *api.NodeFacts
	for {
		now, err := a.cfg.Facts(ctx)
		if err != nil {
			a.cfg.Log.Warn("look at this node's routes and ports", "err", err)
			now = last
		}
		if now == nil {
			now = &api.NodeFacts{}
		}
		now = proto.Clone(now).(*api.NodeFacts)
		now.Answers = a.asked.Load()
		if last == nil || !proto.Equal(now, last) {
			select {
			case out <- now:
				last = now
			case <-ctx.Done():
				return
			}
		}
		if now.Answers != a.asked.Load() {
			continue // asked again meanwhile
		}
		select {
		case <-a.ask:
		case <-look.C:
		case <-ctx.Done():
			return
		}
	}
}

// askFacts has the facts told anew.
func (a *Agent) askFacts(sequence uint64) {
	a.asked.Store(sequence)
	select {
	case a.ask <- struct{}{}:
	default: // it is about to look
	}
}
