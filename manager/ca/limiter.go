package ca

import (
	"sync"
	"time"
)

// limiter gives each host a bucket of failures that empties with time. The number of hosts it knows is bounded; beyond it, unknown hosts
// share one bucket.
type limiter struct {
	burst  int
	period time.Duration
	limit  int

	mu    sync.Mutex
	until map[string]time.Time // when the bucket is empty again
}

func newLimiter(burst int, period time.Duration, hosts int) *limiter {
	return &limiter{burst: burst, period: period, limit: hosts, until: map[string]time.Time{}}
}

// blocked returns how long the host has to wait.
func (l *limiter) blocked(host string, now time.Time) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	full := now.Add(time.Duration(l.burst-1) * l.period)
	return max(0, l.until[l.key(host, now)].Sub(full))
}

// charge counts one failure.
func (l *limiter) charge(host string, now time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	k := l.key(host, now)
	t := l.until[k]
	if t.Before(now) {
		t = now
	}
	l.until[k] = t.Add(l.period)
}

// key is the host's bucket, or the shared one when there are too many.
func (l *limiter) key(host string, now time.Time) string {
	if _, ok := l.until[host]; ok || len(l.until) < l.limit {
		return host
	}
	for h, t := range l.until {
		if !t.After(now) {
			delete(l.until, h)
		}
	}
	if len(l.until) < l.limit {
		return host
	}
	return ""
}
