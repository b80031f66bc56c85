package demo

import (
	"context"
	"sync"
	"time"
)

const (
	loadClients = 6 // half with a new connection per request, half with one kept alive
	loadPause   = 5 * time.Millisecond
	loadTimeout = 10 * time.Second
)

// loadReport is what the clients saw.
type loadReport struct {
	sent, failed int
	seen         map[string]int // by version
	first        error
}

// load is clients that ask all addresses in turn until stopped.
type load struct {
	cancel context.CancelFunc
	wg     sync.WaitGroup
	mu     sync.Mutex
	rep    loadReport
}

func startLoad(urls []string) *load {
	ctx, cancel := context.WithCancel(context.Background())
	l := &load{cancel: cancel, rep: loadReport{seen: map[string]int{}}}
	for i := range loadClients {
		l.wg.Go(func() { l.client(ctx, urls, i) })
	}
	return l
}

func (l *load) client(ctx context.Context, urls []string, i int) {
	tick := time.NewTicker(loadPause)
	defer tick.Stop()
	for n := i; ctx.Err() == nil; n++ {
		// Requests under way when the load ends are finished, not cut off: they count.
		rctx, cancel := context.WithTimeout(context.Background(), loadTimeout)
		_, version, err := ask(rctx, urls[n%len(urls)], i%2 == 0)
		cancel()
		l.mu.Lock()
		l.rep.sent++
		l.rep.seen[version]++
		if err != nil {
			l.rep.failed++
			if l.rep.first == nil {
				l.rep.first = err
			}
		}
		l.mu.Unlock()
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
}

func (l *load) stop() loadReport {
	l.cancel()
	l.wg.Wait()
	return l.rep
}
