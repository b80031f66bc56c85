package transport

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"

	"skein/manager/api"
)

const (
	keepaliveTime    = 5 * time.Second // a dead peer is noticed after time + timeout at the latest
	keepaliveTimeout = 3 * time.Second
	maxHeaderBytes   = 32 << 10
	maxStreams       = 4096 // per connection; a forwarding follower and its users share one
	// A session's connection is idle most of the time, and a leader has thousands: the default buffers would take 64 KiB of each.
	bufferBytes = 8 << 10
)

// ServerOptions are the options of a gRPC server on the GRPC listener: its connections' TLS state, size and stream bounds, keepalive.
func ServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.Creds(muxCredentials{}),
		grpc.MaxRecvMsgSize(api.MaxMessageBytes),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.ReadBufferSize(bufferBytes),
		grpc.WriteBufferSize(bufferBytes),
		grpc.SharedWriteBuffer(true),
		grpc.MaxHeaderListSize(maxHeaderBytes),
		grpc.InTapHandle((&streamCount{open: map[string]int{}}).admit),
		grpc.ConnectionTimeout(handshakeTimeout),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: keepaliveTime, Timeout: keepaliveTimeout}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: keepaliveTime / 2, PermitWithoutStream: true}),
	}
}

// ClientOptions are the options of a gRPC client connection to another node; conf decides whom to trust.
func ClientOptions(conf *tls.Config) []grpc.DialOption {
	return []grpc.DialOption{
		grpc.WithTransportCredentials(muxCredentials{client: conf}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(api.MaxMessageBytes), grpc.MaxCallSendMsgSize(api.MaxMessageBytes)),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: keepaliveTime, Timeout: keepaliveTimeout}),
	}
}

// DialGRPC makes a gRPC client connection to a node's port. It connects when first used.
func (m *Mux) DialGRPC(addr string) (*grpc.ClientConn, error) { return DialGRPC(addr, m.client) }

// DialGRPC makes a gRPC client connection to a node's port with its own TLS configuration.
func DialGRPC(addr string, conf *tls.Config) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///"+addr, ClientOptions(conf)...)
}

// muxCredentials tells gRPC about TLS that was or is set up outside of it.
type muxCredentials struct{ client *tls.Config }

func (c muxCredentials) ClientHandshake(ctx context.Context, _ string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	if c.client == nil {
		return nil, nil, errors.New("no TLS client configuration")
	}
	conf := c.client.Clone()
	conf.NextProtos = []string{api.ALPNGRPC}
	tc := tls.Client(raw, conf)
	if err := tc.HandshakeContext(ctx); err != nil {
		_ = raw.Close()
		return nil, nil, err
	}
	return tc, tlsInfo(tc), nil
}

func (c muxCredentials) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	mc, ok := conn.(*Conn)
	if !ok {
		return nil, nil, errors.New("connection did not come through the node port")
	}
	return mc, tlsInfo(mc.Conn), nil
}

func tlsInfo(tc *tls.Conn) credentials.TLSInfo {
	return credentials.TLSInfo{State: tc.ConnectionState(), CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}}
}

func (c muxCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}

func (c muxCredentials) Clone() credentials.TransportCredentials { return c }

func (c muxCredentials) OverrideServerName(string) error { return nil }
