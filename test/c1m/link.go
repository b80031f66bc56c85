package c1m

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/test/bufconn"
)

const (
	pipeBytes = 16 << 10 // buffered in each direction of a connection
	noMember  = 0        // number of a caller without a certificate
)

// book knows the certificates of the simulated nodes by number, so that a connection within the process needs to say only a number.
type book struct {
	mu    sync.RWMutex
	certs []*x509.Certificate
}

func newBook(n int) *book { return &book{certs: make([]*x509.Certificate, n+1)} }

func (b *book) set(number int, c *x509.Certificate) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.certs[number] = c
}

func (b *book) get(number uint32) (*x509.Certificate, error) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	if int(number) >= len(b.certs) {
		return nil, fmt.Errorf("no node has the number %d", number)
	}
	return b.certs[number], nil
}

// linkCredentials stand for a TLS handshake that both sides are spared.
type linkCredentials struct {
	book   *book
	number uint32
}

func (c linkCredentials) ClientHandshake(_ context.Context, _ string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], c.number)
	if _, err := raw.Write(b[:]); err != nil {
		return nil, nil, err
	}
	return raw, secure(nil), nil
}

func (c linkCredentials) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	var b [4]byte
	if _, err := io.ReadFull(raw, b[:]); err != nil {
		return nil, nil, err
	}
	cert, err := c.book.get(binary.BigEndian.Uint32(b[:]))
	if err != nil {
		return nil, nil, err
	}
	return raw, secure(cert), nil
}

func secure(cert *x509.Certificate) credentials.TLSInfo {
	info := credentials.TLSInfo{CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}}
	if cert != nil {
		chain := []*x509.Certificate{cert}
		info.State = tls.ConnectionState{PeerCertificates: chain, VerifiedChains: [][]*x509.Certificate{chain}}
	}
	return info
}

func (c linkCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}

func (c linkCredentials) Clone() credentials.TransportCredentials { return c }

func (c linkCredentials) OverrideServerName(string) error { return nil }

// dial makes a connection of a simulated node to a manager's listener within the process.
func dial(lis *bufconn.Listener, b *book, number int) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///manager",
		grpc.WithTransportCredentials(linkCredentials{b, uint32(number)}),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return lis.DialContext(ctx) }),
		grpc.WithReadBufferSize(4<<10), grpc.WithWriteBufferSize(4<<10), grpc.WithSharedWriteBuffer(true),
	)
}
