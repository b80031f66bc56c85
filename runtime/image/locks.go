package image

import (
	"context"
	"errors"
	"sync"
)

// keyLocks is a lock per key: two pulls never fetch one blob or unpack one layer twice. Its zero value is ready.
type keyLocks struct {
	mu sync.Mutex
	m  map[string]*keyLock
}

type keyLock struct {
	held chan struct{} // holds one token
	refs int
}

func (k *keyLocks) lock(ctx context.Context, key string) (unlock func(), err error) {
	k.mu.Lock()
	if k.m == nil {
		k.m = map[string]*keyLock{}
	}
	l := k.m[key]
	if l == nil {
		l = &keyLock{held: make(chan struct{}, 1)}
		k.m[key] = l
	}
	l.refs++
	k.mu.Unlock()
	select {
	case l.held <- struct{}{}:
		return func() { <-l.held; k.release(key, l) }, nil
	case <-ctx.Done():
		k.release(key, l)
		return nil, context.Cause(ctx)
	}
}

func (k *keyLocks) release(key string, l *keyLock) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if l.refs--; l.refs == 0 {
		delete(k.m, key)
	}
}

// flights shares the work of equal pulls. The work lives as long as somebody waits for it. The zero value is ready.
type flights struct {
	mu sync.Mutex
	m  map[string]*flight
	wg sync.WaitGroup
}

type flight struct {
	cancel context.CancelFunc
	done   chan struct{}
	img    Image
	err    error

	mu      sync.Mutex
	waiters map[*waiter]struct{}
	last    map[string]Progress // latest per layer, for who comes late
}

type waiter struct {
	mu     sync.Mutex
	report func(Progress) // nil once the waiter left
}

func (w *waiter) tell(p Progress) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.report != nil {
		w.report(p)
	}
}

func (w *waiter) leave() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.report = nil
}

// do runs work once for all that ask with the same key while it runs. base bounds the work; ctx only this caller's patience.
func (f *flights) do(ctx, base context.Context, key string, report func(Progress), work func(context.Context, func(Progress)) (Image, error)) (Image, error) {
	w := &waiter{report: report}
	fl := f.join(base, key, w, work)
	defer f.leave(key, fl, w)
	select {
	case <-fl.done:
		return fl.img, fl.err
	case <-ctx.Done():
		return Image{}, context.Cause(ctx)
	}
}

func (f *flights) join(base context.Context, key string, w *waiter, work func(context.Context, func(Progress)) (Image, error)) *flight {
	f.mu.Lock()
	defer f.mu.Unlock()
	if fl := f.m[key]; fl != nil {
		fl.add(w)
		return fl
	}
	ctx, cancel := context.WithCancel(base)
	fl := &flight{cancel: cancel, done: make(chan struct{}), waiters: map[*waiter]struct{}{w: {}}, last: map[string]Progress{}}
	if f.m == nil {
		f.m = map[string]*flight{}
	}
	f.m[key] = fl
	f.wg.Go(func() {
		defer cancel()
		img, err := work(ctx, fl.tell)
		f.mu.Lock()
		if f.m[key] == fl {
			delete(f.m, key)
		}
		f.mu.Unlock()
		if err != nil && base.Err() != nil {
			err = errors.Join(errClosed, err)
		}
		fl.img, fl.err = img, err
		close(fl.done)
	})
	return fl
}

// leave ends the work when nobody waits any more; a later caller starts anew.
func (f *flights) leave(key string, fl *flight, w *waiter) {
	w.leave()
	f.mu.Lock()
	defer f.mu.Unlock()
	fl.mu.Lock()
	defer fl.mu.Unlock()
	delete(fl.waiters, w)
	if len(fl.waiters) == 0 {
		fl.cancel()
		if f.m[key] == fl {
			delete(f.m, key)
		}
	}
}

func (f *flights) wait() { f.wg.Wait() }

func (fl *flight) add(w *waiter) {
	fl.mu.Lock()
	fl.waiters[w] = struct{}{}
	past := make([]Progress, 0, len(fl.last))
	for _, p := range fl.last {
		past = append(past, p)
	}
	fl.mu.Unlock()
	for _, p := range past {
		w.tell(p)
	}
}

func (fl *flight) tell(p Progress) {
	fl.mu.Lock()
	fl.last[p.ID] = p
	all := make([]*waiter, 0, len(fl.waiters))
	for w := range fl.waiters {
		all = append(all, w)
	}
	fl.mu.Unlock()
	for _, w := range all {
		w.tell(p)
	}
}
