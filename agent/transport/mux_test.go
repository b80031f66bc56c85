package transport_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"skein/agent/identity/identitytest"
	"skein/agent/transport"
	"skein/manager/api"
)

func start(t *testing.T, ca *identitytest.CA) *transport.Mux {
	t.Helper()
	id := ca.Identity(t, api.RoleManager)
	mux, err := transport.Listen(transport.Config{Addr: "127.0.0.1:0", Server: id.ServerTLS(), Client: id.ClientTLS("")})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { _ = mux.Run(ctx); close(done) }()
	t.Cleanup(func() { cancel(); <-done })
	return mux
}

// echo answers each connection with its protocol's name and the peer's id.
func echo(t *testing.T, name string, ln net.Listener) {
	t.Helper()
	var wg sync.WaitGroup
	wg.Add(1)
	go func() {
		defer wg.Done()
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			fmt.Fprintf(c, "%s %s\n", name, c.(*transport.Conn).Peer().NodeID)
			_ = c.Close()
		}
	}()
	t.Cleanup(func() { _ = ln.Close(); wg.Wait() })
}

func TestProtocolsAreToldApart(t *testing.T) {
	ca := identitytest.New(t)
	mux := start(t, ca)
	echo(t, "grpc", mux.GRPC())
	echo(t, "raft", mux.Raft())
	echo(t, "gossip", mux.Gossip())
	peer := ca.Identity(t, api.RoleManager)
	for name, alpn := range map[string]string{"grpc": api.ALPNGRPC, "raft": api.ALPNRaft, "gossip": api.ALPNGossip} {
		c, err := transport.Dial(t.Context(), mux.Addr().String(), alpn, peer.ClientTLS(""))
		if err != nil {
			t.Fatalf("%s: %v", alpn, err)
		}
		line, err := bufio.NewReader(c).ReadString('\n')
		if want := name + " " + peer.NodeID() + "\n"; line != want || err != nil {
			t.Errorf("%s: got %q, %v; want %q", alpn, line, err, want)
		}
		_ = c.Close()
	}
}

func TestStrangersGetGRPCOnlyAndAreBounded(t *testing.T) {
	ca := identitytest.New(t)
	mux := start(t, ca)
	grpcLn := mux.GRPC()
	kept := make(chan net.Conn, 64)
	go func() {
		for {
			c, err := grpcLn.Accept()
			if err != nil {
				close(kept)
				return
			}
			kept <- c
		}
	}()
	defer func() {
		_ = grpcLn.Close()
		for c := range kept {
			_ = c.Close()
		}
	}()
	anon := &tls.Config{MinVersion: tls.VersionTLS13, InsecureSkipVerify: true}
	alive := func(alpn string) (net.Conn, bool) {
		c, err := transport.Dial(t.Context(), mux.Addr().String(), alpn, anon)
		if err != nil {
			return nil, false
		}
		// A refused connection ends; one that is kept says nothing.
		_ = c.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		_, err = c.Read(make([]byte, 1))
		ne, timeout := err.(net.Error)
		return c, timeout && ne.Timeout()
	}
	for _, alpn := range []string{api.ALPNRaft, api.ALPNGossip} {
		if _, ok := alive(alpn); ok {
			t.Errorf("%s is open to a client without a certificate", alpn)
		}
	}
	n := 0
	for range 20 {
		if c, ok := alive(api.ALPNGRPC); ok {
			n++
			defer c.Close()
		}
	}
	if n != 16 {
		t.Errorf("one host holds %d connections without a certificate, want 16", n)
	}
	// Nodes of the cluster still get in.
	if _, err := transport.Dial(t.Context(), mux.Addr().String(), api.ALPNGRPC, ca.Identity(t, api.RoleWorker).ClientTLS("")); err != nil {
		t.Errorf("a node was kept out: %v", err)
	}
}

func TestUnservedProtocolAndDisconnect(t *testing.T) {
	ca := identitytest.New(t)
	mux := start(t, ca)
	_ = mux.Raft().Close() // nobody serves it here
	worker := ca.Identity(t, api.RoleWorker)
	c, err := transport.Dial(t.Context(), mux.Addr().String(), api.ALPNRaft, worker.ClientTLS(""))
	if err == nil {
		_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
		if _, err := c.Read(make([]byte, 1)); err == nil {
			t.Error("unserved protocol answered")
		} else if ne, ok := err.(net.Error); ok && ne.Timeout() {
			t.Error("unserved protocol keeps the connection")
		}
	}
	go func() {
		for {
			c, err := mux.GRPC().Accept()
			if err != nil {
				return
			}
			_, _ = c.Write([]byte("x")) // tells the client that the connection is registered
		}
	}()
	c, err = transport.Dial(t.Context(), mux.Addr().String(), api.ALPNGRPC, worker.ClientTLS(""))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	mux.Disconnect(worker.NodeID())
	_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Error("the connection of a disconnected node lives on")
	} else if ne, ok := err.(net.Error); ok && ne.Timeout() {
		t.Error("the connection of a disconnected node lives on")
	}
}

func TestHandshakeIsBoundedInTime(t *testing.T) {
	if testing.Short() {
		t.Skip("takes the handshake's 5 s")
	}
	t.Parallel()
	mux := start(t, identitytest.New(t))
	c, err := net.Dial("tcp", mux.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetReadDeadline(time.Now().Add(8 * time.Second))
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Error("got data without a handshake")
	} else if ne, ok := err.(net.Error); ok && ne.Timeout() {
		t.Error("an idle handshake is kept for more than 8 s")
	}
}
