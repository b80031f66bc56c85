package transport_test

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"skein/agent/identity/identitytest"
	"skein/agent/transport"
	"skein/manager/api"
)

// service runs gRPC with one method on a node's port; calls of /s/hold wait until the test ends.
func service(t *testing.T, mux *transport.Mux) {
	t.Helper()
	hold, release := context.WithCancel(context.Background())
	desc := grpc.ServiceDesc{ServiceName: "s", HandlerType: (*any)(nil), Methods: []grpc.MethodDesc{{MethodName: "hi",
		Handler: func(_ any, _ context.Context, dec func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
			return &api.Empty{}, dec(&api.Object{})
		}}}, Streams: []grpc.StreamDesc{{StreamName: "hold", ClientStreams: true, Handler: func(_ any, s grpc.ServerStream) error {
		select {
		case <-hold.Done():
		case <-s.Context().Done():
		}
		return nil
	}}}}
	srv := grpc.NewServer(transport.ServerOptions()...)
	srv.RegisterService(&desc, nil)
	done := make(chan struct{})
	go func() { _ = srv.Serve(mux.GRPC()); close(done) }()
	t.Cleanup(func() { release(); srv.Stop(); <-done })
}

// greets makes a new connection and a call, and returns how long both took.
func greets(t *testing.T, addr string, conf *tls.Config) time.Duration {
	t.Helper()
	began := time.Now()
	conn, err := transport.DialGRPC(addr, conf)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for try := 1; ; try++ { // nodes try again, too
		err := conn.Invoke(ctx, "/s/hi", &api.Object{}, &api.Empty{}, grpc.WaitForReady(true))
		if err == nil {
			return time.Since(began)
		}
		if try == 3 {
			t.Errorf("a good node: %v", err)
			return time.Since(began)
		}
	}
}

func heap() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// TestIdleHandshakes: thousands of connections that say nothing, or a little at a time, from the same address as good nodes, do not keep
// these out, and take no memory that grows.
func TestIdleHandshakes(t *testing.T) {
	ca := identitytest.New(t)
	mux := start(t, ca)
	service(t, mux)
	worker := ca.Identity(t, api.RoleWorker)
	var calm []time.Duration
	for range 10 {
		calm = append(calm, greets(t, mux.Addr().String(), worker.ClientTLS("")))
	}
	before := heap()
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for i := range 8 { // 10,000 in all, as fast as they are taken, at most 1,000 open on our side
		wg.Go(func() {
			var mine []net.Conn
			for range 10_000 / 8 {
				if ctx.Err() != nil {
					break
				}
				c, err := net.Dial("tcp", mux.Addr().String())
				if err != nil {
					continue
				}
				if i%2 == 0 {
					_, _ = c.Write([]byte{22, 3, 1, 2, 0, 1}) // the begin of a hello
				}
				if mine = append(mine, c); len(mine) > 120 {
					mine[0].Close()
					mine = mine[1:]
				}
			}
			for _, c := range mine {
				c.Close()
			}
		})
	}
	var stormy []time.Duration
	for range 10 {
		stormy = append(stormy, greets(t, mux.Addr().String(), worker.ClientTLS("")))
	}
	grown := int64(heap()) - int64(before)
	wg.Wait()
	stop()
	slices.Sort(calm)
	slices.Sort(stormy)
	t.Logf("a new connection and a call: median %v in calm, %v in the storm, worst %v; heap grew by %d KiB", calm[5], stormy[5], stormy[9], grown>>10)
	if grown > 64<<20 {
		t.Errorf("the heap grew by %d MiB", grown>>20)
	}
	if stormy[9] > 10*time.Second {
		t.Errorf("a good node waited %v", stormy[9])
	}
}

// TestStrangersMayNotTalk: without a certificate one may send what joining takes, no more.
func TestStrangersMayNotTalk(t *testing.T) {
	mux := start(t, identitytest.New(t))
	service(t, mux)
	anonymous := &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13}
	greets(t, mux.Addr().String(), anonymous)
	conn, err := transport.DialGRPC(mux.Addr().String(), anonymous)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	big := &api.Object{Json: make([]byte, 1<<20)}
	if err := conn.Invoke(t.Context(), "/s/hi", big, &api.Empty{}); status.Code(err) != codes.Unavailable {
		t.Errorf("a megabyte without a certificate: %v", err)
	}
	headers := metadata.AppendToOutgoingContext(t.Context(), "x-huge", strings.Repeat("x", 1<<20))
	if err := conn.Invoke(headers, "/s/hi", &api.Object{}, &api.Empty{}); err == nil {
		t.Error("a megabyte of headers was taken")
	}
	huge := &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13, ServerName: strings.Repeat("a.", 30_000) + "b", NextProtos: []string{api.ALPNGRPC}}
	if c, err := tls.Dial("tcp", mux.Addr().String(), huge); err == nil {
		_, err = c.Read(make([]byte, 1))
		if !errors.Is(err, io.EOF) {
			t.Logf("a huge server name: %v", err)
		}
		c.Close()
	}
	greets(t, mux.Addr().String(), anonymous)
}

// TestStreamFlood: a worker may have some calls under way, a manager many.
func TestStreamFlood(t *testing.T) {
	ca := identitytest.New(t)
	mux := start(t, ca)
	service(t, mux)
	open := func(conn *grpc.ClientConn, n int) (refused int) {
		for range n {
			ctx, cancel := context.WithCancel(t.Context())
			t.Cleanup(cancel)
			s, err := conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true}, "/s/hold")
			if err == nil {
				err = s.SendMsg(&api.Empty{})
			}
			done := make(chan error, 1)
			go func() { done <- s.RecvMsg(&api.Empty{}) }()
			select {
			case err = <-done:
				if status.Code(err) == codes.ResourceExhausted {
					refused++
				}
			case <-time.After(20 * time.Millisecond):
			}
		}
		return refused
	}
	evil := ca.Identity(t, api.RoleWorker)
	for range 2 { // more connections do not help
		conn, err := transport.DialGRPC(mux.Addr().String(), evil.ClientTLS(""))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		t.Logf("refused %d of 40", open(conn, 40))
	}
	conn, err := transport.DialGRPC(mux.Addr().String(), evil.ClientTLS(""))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.Invoke(t.Context(), "/s/hi", &api.Object{}, &api.Empty{}); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("a worker with many calls under way makes another: %v", err)
	}
	greets(t, mux.Addr().String(), ca.Identity(t, api.RoleWorker).ClientTLS(""))
	good, err := transport.DialGRPC(mux.Addr().String(), ca.Identity(t, api.RoleManager).ClientTLS(""))
	if err != nil {
		t.Fatal(err)
	}
	defer good.Close()
	if n := open(good, 64); n != 0 {
		t.Errorf("%d calls of a manager were refused", n)
	}
}
