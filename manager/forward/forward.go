// Package forward passes requests that only the leader can answer from any other manager to it.
//
// A request is checked by authz first, then passed on with the caller's identity in its metadata; the leader accepts that only from
// managers and checks it again. A request is passed on at most once: a manager that gets a forwarded one and does not lead says so, and
// the first manager, which alone waits, tries again for a bounded time, so an election in progress is a short delay and not an error. What
// may have reached a leader is not sent twice, unless it only reads. Who uses it: package manager, as the inner interceptor of its server.
package forward

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"skein/manager/api"
	"skein/manager/authz"
)

const (
	defaultWait    = 5 * time.Second        // an election is over in less than 4 s (DECISIONS 13)
	connectTimeout = time.Second            // a leader that does not answer within it is probably dead
	deposedGrace   = 500 * time.Millisecond // for the last answers of a leader that handed over
	retryPause     = 100 * time.Millisecond // between attempts when leadership does not change meanwhile
	maxReplyBytes  = 64 << 20               // lists of a big cluster; between managers only
	// Trailers of an answer to a forwarded request.
	answered  = "skein-answered"   // a manager answered: an error is its own and not the connection's
	notLeader = "skein-not-leader" // the request was refused before anything was done
)

// Leadership is what the forwarder must know of consensus.
type Leadership interface {
	// Leader returns the leader's id and RPC address, empty if none is known, and whether this manager is it and ready to write.
	Leader() (id, addr string, self bool)
	// Changed returns a channel that is closed at the next change of Leader's answer.
	Changed() <-chan struct{}
}

// Config of a Forwarder.
type Config struct {
	Leadership Leadership
	// Dial makes a client connection to a manager's RPC address; it must accept managers only.
	Dial func(addr string) (*grpc.ClientConn, error)
	// Wait bounds how long a request waits for a leader; 0: 5 s.
	Wait time.Duration
}

// Forwarder owns the connection to the leader.
type Forwarder struct {
	cfg Config

	mu   sync.Mutex
	addr string
	conn *grpc.ClientConn
}

// New returns a Forwarder; it connects when first used.
func New(cfg Config) *Forwarder {
	if cfg.Wait == 0 {
		cfg.Wait = defaultWait
	}
	return &Forwarder{cfg: cfg}
}

// Close closes the connection to the leader.
func (f *Forwarder) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.conn == nil {
		return nil
	}
	err := f.conn.Close()
	f.conn, f.addr = nil, ""
	return err
}

// Unary is the interceptor behind authz: methods of the leader run here if we lead, else there.
func (f *Forwarder) Unary() grpc.UnaryServerInterceptor {
	m := methods()
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
		method, ok := m[info.FullMethod]
		if !ok {
			return handler(ctx, req)
		}
		return f.route(ctx, method, req, info.FullMethod, handler)
	}
}

func (f *Forwarder) route(ctx context.Context, m method, req any, name string, handler grpc.UnaryHandler) (any, error) {
	caller, ok := authz.CallerFrom(ctx)
	if !ok {
		return nil, api.Errorf(errdefs.ErrUnauthenticated, "%s: request without a caller", name)
	}
	if caller.Forwarded {
		_ = grpc.SetTrailer(ctx, metadata.Pairs(answered, "1"))
	}
	wait, cancel := context.WithTimeout(ctx, f.cfg.Wait)
	defer cancel()
	var last error // why the leader could not be asked; nil while there is none
	for {
		changed := f.cfg.Leadership.Changed() // before Leader, so that no change is missed
		_, addr, self := f.cfg.Leadership.Leader()
		switch {
		case self:
			reply, err := handler(ctx, req)
			again := err != nil && errdefs.IsUnavailable(err) && (m.again || api.IsNotDone(err)) // leadership was lost on the way
			if again && caller.Forwarded {
				_ = grpc.SetTrailer(ctx, metadata.Pairs(notLeader, "1"))
			}
			if !again || caller.Forwarded {
				return reply, err
			}
			last = nil
		case caller.Forwarded:
			_ = grpc.SetTrailer(ctx, metadata.Pairs(notLeader, "1"))
			return nil, api.Errorf(errdefs.ErrUnavailable, "%s: this manager is not the leader", name)
		case addr != "":
			reply := m.reply()
			again, err := f.call(ctx, caller, addr, name, req, reply)
			if err == nil {
				return reply, nil
			}
			if !again && !(m.again && status.Code(err) == codes.Unavailable) {
				return nil, err
			}
			last = err
		default:
			last = nil
		}
		if err := pause(wait, changed, addr != ""); err != nil {
			return nil, noLeader(ctx, name, f.cfg.Wait, last)
		}
	}
}

// pause waits for a change of leadership, or a moment if there is a leader that could be asked again.
func pause(ctx context.Context, changed <-chan struct{}, haveLeader bool) error {
	var tick <-chan time.Time
	if haveLeader {
		t := time.NewTimer(retryPause)
		defer t.Stop()
		tick = t.C
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-changed:
	case <-tick:
	}
	return ctx.Err()
}

func noLeader(ctx context.Context, name string, wait time.Duration, last error) error {
	if err := ctx.Err(); err != nil {
		return err // the caller gave up
	}
	if last != nil {
		return api.Errorf(errdefs.ErrUnavailable, "%s: the leader could not be reached for %s: %s; more than half of the managers must run and reach each other", name, wait, status.Convert(last).Message())
	}
	return api.Errorf(errdefs.ErrUnavailable, "%s: no leader elected for %s: too few managers are running or can reach each other; more than half of them must; see \"docker node ls\" on the others", name, wait)
}

// call passes the request on. again says that the request did certainly not run, so that it may be sent once more.
func (f *Forwarder) call(ctx context.Context, caller authz.Caller, addr, name string, req, reply any) (again bool, err error) {
	conn, err := f.connect(ctx, addr)
	if err != nil {
		return true, err
	}
	ctx, stop := f.whileLeading(ctx, addr)
	defer stop()
	var trailer metadata.MD
	var at peer.Peer
	err = conn.Invoke(authz.Outgoing(ctx, caller), name, req, reply, grpc.Trailer(&trailer), grpc.Peer(&at), grpc.MaxCallRecvMsgSize(maxReplyBytes))
	switch {
	case err == nil:
		return false, nil
	case at.Addr == nil, len(trailer.Get(notLeader)) > 0: // it never left this manager, or the other one did not touch it
		return true, err
	case errors.Is(context.Cause(ctx), errDeposed),
		len(trailer.Get(answered)) == 0 && status.Code(err) == codes.Unavailable:
		return false, status.Errorf(codes.Unavailable, "%s: the connection to the leader %s was lost meanwhile; whether it was done is unknown: look, then try again", name, addr)
	}
	return false, err
}

// errDeposed ends calls to a manager that leads no more.
var errDeposed = errors.New("another manager leads meanwhile")

// whileLeading returns a context that ends a moment after the manager at addr stopped being the leader: cut off from the others, it would
// never answer. stop must be called.
func (f *Forwarder) whileLeading(ctx context.Context, addr string) (_ context.Context, stop func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			changed := f.cfg.Leadership.Changed()
			if _, now, _ := f.cfg.Leadership.Leader(); now != addr {
				break
			}
			select {
			case <-changed:
			case <-ctx.Done():
				return
			}
		}
		t := time.NewTimer(deposedGrace)
		defer t.Stop()
		select {
		case <-t.C:
			cancel(errDeposed)
		case <-ctx.Done():
		}
	}()
	return ctx, func() { cancel(nil); <-ended }
}

// connect returns a connection to the leader that is up.
func (f *Forwarder) connect(ctx context.Context, addr string) (*grpc.ClientConn, error) {
	conn, err := f.connFor(addr)
	if err != nil {
		return nil, fmt.Errorf("leader %s: %w", addr, err)
	}
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	conn.Connect()
	for {
		s := conn.GetState()
		if s == connectivity.Ready {
			return conn, nil
		}
		if s == connectivity.Shutdown {
			return nil, errors.New("leader changed meanwhile")
		}
		if s == connectivity.TransientFailure {
			conn.ResetConnectBackoff()
		}
		conn.Connect()
		if !conn.WaitForStateChange(ctx, s) {
			return nil, status.Errorf(codes.Unavailable, "leader %s does not answer", addr)
		}
	}
}

func (f *Forwarder) connFor(addr string) (*grpc.ClientConn, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.conn != nil && f.addr == addr {
		return f.conn, nil
	}
	conn, err := f.cfg.Dial(addr)
	if err != nil {
		return nil, err
	}
	if f.conn != nil {
		_ = f.conn.Close() // calls under way to the old leader fail with Canceled; they would have failed anyway
	}
	f.conn, f.addr = conn, addr
	return conn, nil
}
