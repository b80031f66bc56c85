package engine

import (
	"context"
	"sync"
	"time"

	"github.com/moby/moby/api/types/events"

	"skein/agent/dockerapi"
)

const (
	eventHistory = 1024 // what `docker events --since` can look back on, as in docker's engine 256, a little longer
	eventQueue   = 256  // of one listener; one that falls further behind is cut off
)

// bus hands the engine's events to listeners and remembers the last ones.
type bus struct {
	mu      sync.Mutex
	history []events.Message
	subs    map[chan events.Message]struct{}
}

func newBus() *bus { return &bus{subs: map[chan events.Message]struct{}{}} }

func (b *bus) publish(m events.Message) {
	now := time.Now()
	m.Scope, m.Time, m.TimeNano = "local", now.Unix(), now.UnixNano()
	b.add(m)
}

// ClusterEvent tells listeners what the managers say happened to an object of the cluster.
func (e *Engine) ClusterEvent(m events.Message) { e.events.add(m) }

func (b *bus) add(m events.Message) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.history) == eventHistory {
		b.history = append(b.history[:0], b.history[1:]...)
	}
	b.history = append(b.history, m)
	for ch := range b.subs {
		select {
		case ch <- m:
		default:
			delete(b.subs, ch)
			close(ch)
		}
	}
}

// subscribe returns past events from since on, and a channel of those to come; it is closed when the listener is too slow.
func (b *bus) subscribe(since time.Time) ([]events.Message, chan events.Message) {
	b.mu.Lock()
	defer b.mu.Unlock()
	var past []events.Message
	if !since.IsZero() {
		for _, m := range b.history {
			if m.TimeNano >= since.UnixNano() {
				past = append(past, m)
			}
		}
	}
	ch := make(chan events.Message, eventQueue)
	b.subs[ch] = struct{}{}
	return past, ch
}

func (b *bus) unsubscribe(ch chan events.Message) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if _, ok := b.subs[ch]; ok {
		delete(b.subs, ch)
		close(ch)
	}
}

func (b *bus) listeners() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.subs)
}

// Events streams from since (zero: now) until ctx is done or until is reached.
func (e *Engine) Events(ctx context.Context, since, until time.Time, f dockerapi.Filters) (<-chan events.Message, error) {
	past, ch := e.events.subscribe(since)
	out := make(chan events.Message)
	var deadline <-chan time.Time
	if !until.IsZero() {
		t := time.NewTimer(time.Until(until))
		context.AfterFunc(ctx, func() { t.Stop() })
		deadline = t.C
	}
	send := func(m events.Message) bool {
		if !until.IsZero() && m.TimeNano > until.UnixNano() {
			return false
		}
		if !eventMatches(m, f) {
			return true
		}
		select {
		case out <- m:
			return true
		case <-ctx.Done():
			return false
		}
	}
	go func() { // owned by the caller's ctx
		defer close(out)
		defer e.events.unsubscribe(ch)
		for _, m := range past {
			if !send(m) {
				return
			}
		}
		for {
			select {
			case m, ok := <-ch:
				if !ok || !send(m) {
					return
				}
			case <-deadline:
				return
			case <-ctx.Done():
				return
			}
		}
	}()
	return out, nil
}

func eventMatches(m events.Message, f dockerapi.Filters) bool {
	for key, want := range f {
		ok := false
		for _, w := range want {
			switch key {
			case "type":
				ok = ok || string(m.Type) == w
			case "event":
				ok = ok || string(m.Action) == w || hasActionPrefix(string(m.Action), w)
			case "container":
				ok = ok || m.Type == events.ContainerEventType && (m.Actor.ID == w || m.Actor.Attributes["name"] == w || len(w) >= 4 && hasPrefix(m.Actor.ID, w))
			case "image":
				ok = ok || m.Actor.ID == w || m.Actor.Attributes["image"] == w || m.Actor.Attributes["name"] == w
			case "network":
				ok = ok || m.Type == events.NetworkEventType && (m.Actor.ID == w || m.Actor.Attributes["name"] == w)
			case "service", "node", "secret", "config", "volume", "daemon":
				ok = ok || string(m.Type) == key && (m.Actor.ID == w || m.Actor.Attributes["name"] == w)
			case "label":
				ok = ok || labelMatches(m.Actor.Attributes, w)
			case "scope":
				ok = ok || m.Scope == w
			}
		}
		if !ok {
			return false
		}
	}
	return true
}

// hasActionPrefix lets "exec_create" match "exec_create: sh".
func hasActionPrefix(action, want string) bool {
	return len(action) > len(want) && action[:len(want)] == want && action[len(want)] == ':'
}
