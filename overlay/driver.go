package overlay

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"

	"skein/overlay/crypt"
	"skein/overlay/dns"
	"skein/overlay/link"
	"skein/overlay/nft"
)

// FDStore keeps descriptors while the daemon is away. The supervisor's client is one.
type FDStore interface {
	StoreFD(ctx context.Context, name string, fd int) error
	LoadFDs(ctx context.Context, prefix string) (map[string]int, error)
	ReleaseFD(ctx context.Context, name string) error
}

// Options configure a Driver.
type Options struct {
	// RunDir holds namespace files in RunDir/netns. Two drivers must not share it.
	RunDir string
	// NetNS is the file of the node's network namespace; empty: the one of this process.
	NetNS string
	// Underlay is the local address of tunnels; invalid: Config.Self.Underlay.
	Underlay netip.Addr
	// FDStore keeps DNS sockets over restarts; nil: they are opened anew.
	FDStore FDStore
	// CheckEvery is the interval of full comparisons in Run; zero: five seconds.
	CheckEvery time.Duration
	// CryptPort is the first of two UDP ports of encrypted networks; zero: crypt.DefaultPort.
	CryptPort uint16
	// RotateKeysEvery is how long a key of encrypted networks is used; zero: crypt's choice.
	RotateKeysEvery time.Duration
	// KeyOverlap is how long a replaced key is still good; zero: crypt's choice.
	KeyOverlap time.Duration
	Logger     *slog.Logger
}

// Driver programs the networks of one node. Its methods are safe for concurrent use; they are carried out one after the other.
type Driver struct {
	opts Options
	log  *slog.Logger
	host *link.NS
	conn *link.Conn
	nft  *nft.Syncer
	dns  *dns.Server
	six  bool // the kernel has IPv6
	// passed are the devices that foreign firewalls were told to accept, nil: unknown; oldDrops the old ones that drop what containers send.
	passed, oldDrops []string
	// resolvers are the node's for foreign names, as they are now.
	resolvers func() []netip.AddrPort

	crypt       *crypt.Tunnel
	keysChanged chan struct{}

	ids idLocks // taken before mu

	lostWake  chan struct{} // something may have been lost
	leaving   atomic.Int32  // sandboxes that wait to be removed
	mended    atomic.Uint64 // differences that Check mended
	departing departures
	rooms     roomPool

	mu   sync.Mutex
	cfg  Config
	have bool // cfg was set
	dry  bool // a comparison runs that changes nothing
	// peersChanged is true while Set applies a config with other nodes or another place of this one.
	peersChanged bool
	routers      map[string]*router
	boxes        map[string]*box
	waiting      map[string]Sandbox // of an earlier daemon, until the tables of their networks are there
	mesh         mesh
	held         held
	owners       socketOwners // has its own lock
	paths        paths        // has its own lock
	bridges      map[string]Bridge
	bridgeTables [2]bridgeTable // skein_bridge of IPv4 and IPv6
	stored       map[string]int // descriptors from the store that nobody took yet
	zoneCache    map[string]cachedZone
	guards       [2]*nft.Table // against plain packets of encrypted networks, of IPv4 and IPv6; nil: not there
	guardPort    uint16
	tunnelErr    error       // why encrypted networks cannot be applied
	auditing     *link.Audit // watches what is written now; nil: nothing does
}

// New probes the kernel and reads what an earlier driver left. It changes and starts nothing.
func New(opts Options) (*Driver, error) {
	if opts.RunDir == "" || !filepath.IsAbs(opts.RunDir) {
		return nil, fmt.Errorf("overlay driver: run directory %q must be an absolute path: %w", opts.RunDir, errdefs.ErrInvalidArgument)
	}
	if opts.Logger == nil {
		opts.Logger = slog.New(slog.DiscardHandler)
	}
	if opts.CheckEvery <= 0 {
		opts.CheckEvery = 5 * time.Second
	}
	d := &Driver{lostWake: make(chan struct{}, 1), opts: opts, log: opts.Logger.With("component", "overlay"), routers: map[string]*router{}, boxes: map[string]*box{},
		waiting: map[string]Sandbox{}, bridges: map[string]Bridge{}, stored: map[string]int{},
		resolvers: func() []netip.AddrPort { return dns.HostResolvers() }}
	if err := d.open(); err != nil {
		d.Close()
		return nil, fmt.Errorf("overlay driver: %w", err)
	}
	d.dns = dns.NewServer(d.host.Do, d.log)
	return d, nil
}

func (d *Driver) open() (err error) {
	if d.opts.NetNS == "" {
		d.host, err = link.Current()
	} else {
		d.host, err = link.OpenNS(d.opts.NetNS)
	}
	if err != nil {
		return err
	}
	if d.conn, err = link.Dial(d.host); err != nil {
		return err
	}
	if d.nft, err = nft.NewSyncer(d.host); err != nil {
		return err
	}
	_, err = d.host.ReadSysctl(forwarding6)
	d.six = err == nil
	if err := os.MkdirAll(d.netnsDir(), 0o755); err != nil {
		return err
	}
	if d.opts.FDStore != nil {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if d.stored, err = d.opts.FDStore.LoadFDs(ctx, dnsStorePrefix); err != nil {
			return fmt.Errorf("load DNS sockets: %w", err)
		}
	}
	if err := d.openTunnel(); err != nil {
		return err
	}
	return d.adoptGateways()
}

// Close ends DNS serving and releases descriptors. The kernel keeps all networks as they are.
func (d *Driver) Close() error {
	d.departing.work.Wait()
	d.rooms.close()
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.dns != nil {
		d.dns.Close()
	}
	for _, r := range d.routers {
		r.close()
	}
	clear(d.routers)
	closeFDs(d.stored)
	if d.crypt != nil {
		d.crypt.Close()
	}
	if d.nft != nil {
		d.nft.Close()
	}
	if d.conn != nil {
		d.conn.Close()
	}
	if d.host != nil {
		d.host.Close()
	}
	return nil
}

func (d *Driver) netnsDir() string { return filepath.Join(d.opts.RunDir, "netns") }

func (d *Driver) sandboxFile(id string) string { return filepath.Join(d.netnsDir(), id) }

func (d *Driver) routerFile(network string) string {
	return filepath.Join(d.netnsDir(), routerPrefix+tag(network))
}

// netnsFiles lists the files of our namespaces.
func (d *Driver) netnsFiles() (sandboxes, routers []string, err error) {
	entries, err := os.ReadDir(d.netnsDir())
	if err != nil {
		return nil, nil, fmt.Errorf("list network namespaces: %w", err)
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), routerPrefix) {
			routers = append(routers, e.Name())
		} else {
			sandboxes = append(sandboxes, e.Name())
		}
	}
	return sandboxes, routers, nil
}

// Sandboxes lists the ids of all sandboxes found in the kernel but those that are on their way out.
func (d *Driver) Sandboxes() ([]string, error) {
	boxes, _, err := d.netnsFiles()
	return slices.DeleteFunc(boxes, d.departs), err
}

// Set makes the kernel agree with cfg, which must not be changed afterwards. The result has, per network id and for "mesh", the reason why it could not be applied or nil;
// the error is for a config that makes no sense at all, then nothing was changed.
func (d *Driver) Set(ctx context.Context, cfg Config) (Applied, error) {
	if err := validate(cfg); err != nil {
		return nil, err
	}
	cfg = d.dropIPv6(cfg)
	cfg.Peers = d.sameFamily(cfg)
	d.mu.Lock()
	defer d.mu.Unlock()
	full := !d.have
	d.peersChanged = !full && (cfg.Self != d.cfg.Self || cfg.DataPort != d.cfg.DataPort || cfg.MeshPool != d.cfg.MeshPool ||
		cfg.MeshPool6 != d.cfg.MeshPool6 || !slices.Equal(cfg.Peers, d.cfg.Peers))
	d.cfg, d.have = cfg, true
	defer func() { d.peersChanged = false }()
	return d.apply(ctx, full), nil
}

// apply brings everything of d.cfg into the kernel; with full it trusts nothing that it remembers.
func (d *Driver) apply(ctx context.Context, full bool) Applied {
	out := Applied{}
	out["mesh"] = d.applyMesh(full)
	d.removeRouters(full)
	if d.tunnelErr = d.guardEncrypted(full); d.tunnelErr == nil {
		d.tunnelErr = d.applyTunnel()
	}
	for i := range d.cfg.Networks {
		nw := &d.cfg.Networks[i]
		if out[nw.ID] = ctx.Err(); out[nw.ID] == nil {
			out[nw.ID] = d.applyNetwork(nw, full)
		}
	}
	if err := d.passFirewalls(full); err != nil {
		d.log.Error("foreign firewalls", "error", err)
	}
	d.updateDNS()
	d.pokeLost()
	d.tellSandboxes(ctx)
	d.takeWaiting(ctx)
	for table, err := range out {
		if err != nil {
			d.log.Error("network not applied", "table", table, "error", err)
		}
	}
	return out
}

// mendWithin is the promise: what somebody deletes is back in this time.
const mendWithin = 10 * time.Second

// Run compares everything with the kernel from time to time and mends it, until ctx is done. Comparing takes at most a fiftieth of the
// time, so large nodes are compared less often than CheckEvery says, but often enough for the promise.
func (d *Driver) Run(ctx context.Context) error {
	var tunnel sync.WaitGroup
	tunnel.Go(func() { _ = d.crypt.Run(ctx) }) // returns nothing but nil, when ctx is done
	tunnel.Go(func() { d.watchLost(ctx) })
	tunnel.Go(func() { d.measurePaths(ctx) })
	defer tunnel.Wait()
	timer := time.NewTimer(d.opts.CheckEvery)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		}
		start := time.Now()
		if err := d.Check(ctx); err != nil {
			d.log.Error("network check", "error", err)
		}
		took := time.Since(start)
		timer.Reset(max(d.opts.CheckEvery, min(50*took, mendWithin-2*took)))
	}
}

func validate(cfg Config) error {
	bad := func(format string, a ...any) error {
		return fmt.Errorf("network config: "+format+": %w", append(a, errdefs.ErrInvalidArgument)...)
	}
	if cfg.Self.Index < 1 || cfg.Self.Index > maxNode {
		return bad("own node index %d is not in 1..%d", cfg.Self.Index, maxNode)
	}
	if !cfg.MeshPool.IsValid() || !cfg.MeshPool.Addr().Is4() || cfg.MeshPool.Bits() > 21 {
		return bad("mesh pool %s must be an IPv4 prefix of at most 21 bits", cfg.MeshPool)
	}
	if cfg.MeshPool6.IsValid() && (!cfg.MeshPool6.Addr().Is6() || cfg.MeshPool6.Bits() != 48) {
		return bad("IPv6 prefix %s of the mesh must have 48 bits", cfg.MeshPool6)
	}
	if cfg.DataPort == 0 {
		return bad("data port is missing")
	}
	seen := map[uint32]string{cfg.Self.Index: cfg.Self.Hostname}
	for _, p := range cfg.Peers {
		if p.Index < 1 || p.Index > maxNode || !p.Underlay.IsValid() {
			return bad("node %q: index %d is not in 1..%d or address %q is none", p.Hostname, p.Index, maxNode, p.Underlay)
		}
		if other, ok := seen[p.Index]; ok {
			return bad("nodes %q and %q share index %d", other, p.Hostname, p.Index)
		}
		seen[p.Index] = p.Hostname
	}
	for _, n := range cfg.Networks {
		if n.VNI == 0 || n.VNI >= 1<<24 || n.VNI == meshVNI {
			return bad("network %q: VNI %d is not in 1..16777215 or is the mesh's", n.Name, n.VNI)
		}
		if !n.Subnet4.IsValid() || !n.Subnet4.Addr().Is4() {
			return bad("network %q: subnet %q is not IPv4", n.Name, n.Subnet4)
		}
	}
	return nil
}
