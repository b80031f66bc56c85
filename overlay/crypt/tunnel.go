package crypt

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// FDStore keeps descriptors while the daemon is away. The supervisor's client is one.
type FDStore interface {
	StoreFD(ctx context.Context, name string, fd int) error
	LoadFDs(ctx context.Context, prefix string) (map[string]int, error)
	ReleaseFD(ctx context.Context, name string) error
}

// greetAllFor is how long after its start a daemon that took up keys begins all sessions itself.
const greetAllFor = 10 * time.Second

// Names in the store.
const (
	storePrefix = "crypt/"
	keysName    = storePrefix + "keys"
	udpPrefix   = storePrefix + "udp/" // and the slot
	tunPrefix   = storePrefix + "tun/" // and the network's id
)

// DefaultPort is the UDP port of a node's first key; its successor has the next one.
const DefaultPort = 51840

// Options configure a Tunnel.
type Options struct {
	// Do runs a function on a thread in the node's network namespace.
	Do func(func() error) error
	// MAC is the address of a node on the VXLAN with that VNI.
	MAC func(vni, node uint32) MAC
	// Store keeps keys, sockets and devices over restarts of the daemon; nil: they are gone with it.
	Store FDStore
	// Port is the UDP port of keys in slot 0, that of slot 1 is the next; zero: DefaultPort.
	Port uint16
	// RotateEvery is how long a key is used; zero: twelve hours.
	RotateEvery time.Duration
	// Overlap is how long a replaced key is still good for what others send; zero: thirty seconds.
	Overlap time.Duration
	// KeysChanged, where set, is called when Keys returns something else. It must not block nor call the Tunnel.
	KeysChanged func()
	Log         *slog.Logger
}

// Config is who takes part.
type Config struct {
	Self     uint32     // index of this node
	Underlay netip.Addr // where its WireGuard packets come from
	DataPort uint16     // VXLAN's UDP port, inside the tunnel
	MTU      int        // of the tunnel: the underlay's less Overhead
	Nodes    []Node     // every node that has an endpoint on an encrypted network of this one
}

// Node is another node.
type Node struct {
	Index    uint32
	Underlay netip.Addr
	Keys     []Key // the oldest first
}

// Tunnel is the node's end of WireGuard. Its methods are safe for concurrent use.
type Tunnel struct {
	opts Options
	log  *slog.Logger
	wake chan struct{} // capacity 1: something is to be settled

	senderMu sync.Mutex
	resumed  chan struct{}                       // closed when there is a sender
	sender   atomic.Pointer[side]                // encrypts what the networks send
	routes   atomic.Pointer[map[uint32]uint8]    // slot of the key by which a node is addressed
	vnis     atomic.Pointer[map[uint32]*network] // for what comes in
	lost     lossCounts

	mu       sync.Mutex
	closed   bool
	cfg      Config
	have     bool
	keys     []ownKey  // the oldest first
	greetAll time.Time // until then sessions are begun with everybody: an earlier daemon's died with it, and nobody else knows
	stored   map[string]int
	sides    [Slots]*side
	nets     map[string]*network
	// rotating: switched is when the new key took over sending; zero: it did not.
	switched time.Time
}

// lossCounts are packets that were dropped because they could not be encrypted, or were not what they had to be.
type lossCounts struct{ noNode, refused atomic.Uint64 }

// New takes up what an earlier daemon left in the store. It starts nothing.
func New(ctx context.Context, opts Options) (*Tunnel, error) {
	if opts.Port == 0 {
		opts.Port = DefaultPort
	}
	if opts.RotateEvery <= 0 {
		opts.RotateEvery = 12 * time.Hour
	}
	if opts.Overlap <= 0 {
		opts.Overlap = overlapFor
	}
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	t := &Tunnel{opts: opts, log: opts.Log, wake: make(chan struct{}, 1), resumed: make(chan struct{}), stored: map[string]int{}, nets: map[string]*network{}}
	t.routes.Store(&map[uint32]uint8{})
	t.vnis.Store(&map[uint32]*network{})
	if opts.Store != nil {
		var err error
		if t.stored, err = opts.Store.LoadFDs(ctx, storePrefix); err != nil {
			return nil, fmt.Errorf("load what encrypts networks: %w", err)
		}
	}
	if fd, ok := t.stored[keysName]; ok {
		delete(t.stored, keysName)
		keys, err := loadKeys(fd)
		if err != nil {
			t.log.Warn("the node's keys of encrypted networks are made anew", "error", err)
		} else {
			t.keys, t.greetAll = keys, time.Now().Add(greetAllFor)
		}
	}
	if err := t.ensureKeys(ctx); err != nil {
		t.closeStored("")
		return nil, fmt.Errorf("keys of encrypted networks: %w", err)
	}
	return t, nil
}

func (t *Tunnel) closeStored(prefix string) {
	for name, fd := range t.stored {
		if strings.HasPrefix(name, prefix) {
			unix.Close(fd)
			delete(t.stored, name)
		}
	}
}

// takeStored is a descriptor of an earlier daemon, -1 if there is none.
func (t *Tunnel) takeStored(name string) int {
	fd, ok := t.stored[name]
	if !ok {
		return -1
	}
	delete(t.stored, name)
	return fd
}

// release has the store let go of a descriptor.
func (t *Tunnel) release(ctx context.Context, name string) error {
	if fd := t.takeStored(name); fd >= 0 {
		unix.Close(fd)
	}
	if t.opts.Store == nil {
		return nil
	}
	if err := t.opts.Store.ReleaseFD(ctx, name); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("release %s: %w", name, err)
	}
	return nil
}

// Probe tells why this node cannot encrypt, nil if it can.
func (t *Tunnel) Probe() error {
	fd, err := unix.Open(tunPath, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("this node cannot encrypt: open %s: %w: load the kernel module tun", tunPath, err)
	}
	unix.Close(fd)
	return nil
}

// Set takes up who takes part, and starts encrypting. Calling it twice changes nothing.
func (t *Tunnel) Set(ctx context.Context, cfg Config) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return errClosed
	}
	if t.have && (cfg.Self != t.cfg.Self || cfg.Underlay != t.cfg.Underlay || cfg.DataPort != t.cfg.DataPort || cfg.MTU != t.cfg.MTU) {
		t.stopSides()
	}
	t.cfg, t.have = cfg, true
	for _, k := range t.keys {
		if err := t.startSide(ctx, k); err != nil {
			return err
		}
	}
	err := t.setPeers()
	t.poke()
	return err
}

var errClosed = errors.New("the tunnel is closed")

// setPeers tells all sides who takes part. The caller holds mu.
func (t *Tunnel) setPeers() error {
	var err error
	for _, s := range t.sides {
		if s != nil {
			err = errors.Join(err, s.setPeers(t.cfg.Nodes, time.Now().Before(t.greetAll)))
		}
	}
	t.setRoutes()
	return err
}

// setRoutes chooses the key by which each node is addressed: the newest with a session, else the oldest. The caller holds mu.
func (t *Tunnel) setRoutes() {
	s := t.sender.Load()
	routes := make(map[uint32]uint8, len(t.cfg.Nodes))
	for _, n := range t.cfg.Nodes {
		for i, k := range n.Keys {
			if i == 0 || s != nil && s.hasSession(k.Public) {
				routes[n.Index] = k.Slot
			}
		}
	}
	t.routes.Store(&routes)
}

// setSender has a side encrypt what networks send; nil: it waits in their devices.
func (t *Tunnel) setSender(s *side) {
	t.senderMu.Lock()
	defer t.senderMu.Unlock()
	before := t.sender.Swap(s)
	switch {
	case before == nil && s != nil:
		close(t.resumed)
	case before != nil && s == nil:
		t.resumed = make(chan struct{})
	}
}

// awaitSender is closed when there is a sender.
func (t *Tunnel) awaitSender() <-chan struct{} {
	t.senderMu.Lock()
	defer t.senderMu.Unlock()
	return t.resumed
}

// Port is the first of the UDP ports that keys use.
func (t *Tunnel) Port() uint16 { return t.opts.Port }

func (t *Tunnel) poke() {
	select {
	case t.wake <- struct{}{}:
	default:
	}
}

// Stop ends encrypting while there is nothing to encrypt. Keys stay.
func (t *Tunnel) Stop(ctx context.Context) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return errClosed
	}
	if !t.have && len(t.stored)+len(t.nets) == 0 {
		return nil
	}
	t.stopSides()
	t.have, t.cfg = false, Config{}
	var err error
	for id := range t.nets {
		err = errors.Join(err, t.removeNetwork(ctx, id))
	}
	for name := range t.stored {
		err = errors.Join(err, t.release(ctx, name))
	}
	for slot := range uint8(Slots) {
		err = errors.Join(err, t.release(ctx, udpName(slot)))
	}
	return err
}

// Forget ends encrypting and drops the keys: the node leaves the cluster. The next Keys are others.
func (t *Tunnel) Forget(ctx context.Context) error {
	err := t.Stop(ctx)
	if errors.Is(err, errClosed) {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.keys, t.greetAll, t.switched = nil, time.Time{}, time.Time{}
	return errors.Join(err, t.ensureKeys(ctx))
}

// Close ends encrypting with this process. What rests in the store stays: until the next daemon reads the devices, nothing leaves by them.
func (t *Tunnel) Close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return
	}
	t.closed = true
	for _, n := range t.nets {
		n.close()
	}
	clear(t.nets)
	t.stopSides()
	t.closeStored("")
}
