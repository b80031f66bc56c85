package c1m

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"skein/agent/identity"
	"skein/manager/api"
)

// Every node and every task is alike.
const (
	maxNodes    = 1 << 16
	joinsAtOnce = 16

	nodeCPUs   = 64
	nodeMemory = 256 << 30
	taskCPU    = 100_000_000 // thousandths of a millionth
	taskMemory = 64 << 20
)

// meshPool has room for the blocks of 16,382 nodes, which the default one has not.
var meshPool, overlayPools = netip.MustParsePrefix("10.0.0.0/8"), []netip.Prefix{netip.MustParsePrefix("100.64.0.0/10")}

// fleet is all simulated nodes.
type fleet struct {
	c           *cluster
	o           options
	description []byte
	agents      []*agent
	end         context.CancelFunc
	wg          sync.WaitGroup

	running  atomic.Int64 // containers
	removed  atomic.Int64 // containers that ran and were taken away
	sessions atomic.Int64
	losses   atomic.Int64
	mu       sync.Mutex
	lastLoss error
}

func newFleet(c *cluster, o options) *fleet {
	f := &fleet{c: c, o: o, end: func() {}, description: fmt.Appendf(nil,
		`{"Platform":{"Architecture":"x86_64","OS":"linux"},"Resources":{"NanoCPUs":%d,"MemoryBytes":%d},"Engine":{"EngineVersion":"29.0.0"}}`,
		int64(nodeCPUs)*1e9, int64(nodeMemory))}
	for i := range o.agents {
		f.agents = append(f.agents, newAgent(f, i+1))
	}
	return f
}

func hostname(number int) string { return fmt.Sprintf("w%05d", number) }

func underlay(number int) string { return fmt.Sprintf("172.16.%d.%d", number>>8, number&255) }

// containerID is as long as a real one.
func containerID(task string) string { return (task + task + task)[:64] }

// join gives each node its certificate, through the managers' CA.
func (f *fleet) join(ctx context.Context) error {
	tokens, err := f.c.tokens(ctx)
	if err != nil {
		return err
	}
	m, err := f.c.leader(ctx)
	if err != nil {
		return err
	}
	conn, err := dial(m.door, f.c.book, noMember)
	if err != nil {
		return err
	}
	defer conn.Close()
	ca := api.NewCAClient(conn)
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(joinsAtOnce)
	for _, a := range f.agents {
		g.Go(func() error {
			req, err := identity.NewRequest()
			if err != nil {
				return err
			}
			r, err := ca.IssueCertificate(ctx, &api.IssueRequest{Token: tokens.Worker, CsrPem: req.CSRPEM, Hostname: hostname(a.number), UnderlayAddr: underlay(a.number), RpcAddr: underlay(a.number) + ":1"})
			if err != nil {
				return fmt.Errorf("node %d: join: %w", a.number, err)
			}
			block, _ := pem.Decode(r.CertPem)
			if block == nil {
				return errors.New("join: no certificate")
			}
			cert, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				return err
			}
			f.c.book.set(a.number, cert)
			a.id = r.NodeId
			return nil
		})
	}
	return g.Wait()
}

// run starts all agents.
func (f *fleet) run() {
	ctx, cancel := context.WithCancel(context.Background())
	f.end = cancel
	for _, a := range f.agents {
		f.wg.Go(func() { a.run(ctx) })
	}
}

func (f *fleet) stop() {
	f.end()
	f.wg.Wait()
}

func (f *fleet) connected() { f.sessions.Add(1) }

func (f *fleet) lost(err error) {
	f.sessions.Add(-1)
	f.losses.Add(1)
	f.mu.Lock()
	f.lastLoss = err
	f.mu.Unlock()
}

func (f *fleet) awaitSessions(ctx context.Context) error {
	if err := until(ctx, func() bool { return f.sessions.Load() == int64(f.o.agents) }); err != nil {
		f.mu.Lock()
		defer f.mu.Unlock()
		return fmt.Errorf("%d of %d sessions stand, the last one that ended: %v: %w", f.sessions.Load(), f.o.agents, f.lastLoss, err)
	}
	return nil
}
