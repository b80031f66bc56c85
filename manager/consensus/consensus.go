// Package consensus replicates the store's entries among the managers with Raft, on disk.
//
// It guarantees: an acknowledged entry is on the disks of a majority; every manager applies the same entries in the same order; a
// failed write or fsync of the log, a damaged log entry, or an entry of a newer version of Skein ends the process (through Config.Fatal)
// before anything is acknowledged on top of it. It must not look into entries: the store does. Nothing here reads the wall clock but
// the time a leader puts into an entry. Used by manager.
package consensus

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/hashicorp/raft"

	"skein/manager/api"
	"skein/manager/store"
)

// Exit codes for Config.Fatal.
const (
	// ExitStorage: the raft log could not be written, synced or read back as it was written.
	ExitStorage = 74
	// ExitTooOld: an entry or snapshot needs a newer version of Skein.
	ExitTooOld = 76
)

// DefaultReserve is kept free on the disk of the raft log, twice: as a file and as free space.
const DefaultReserve = 64 << 20

// Config says where a manager's log is and how it reaches the others.
type Config struct {
	NodeID    string
	Dir       string           // of the log, snapshots and reserve; made when missing
	Stream    raft.StreamLayer // listens for and dials the other managers; closed with the Node
	Advertise string           // host:port the others dial
	Logger    *slog.Logger
	Store     *store.Store // empty: its content comes from the log
	// Fatal must end the process. It is called when going on would break a guarantee; nothing is acknowledged afterwards.
	Fatal func(exitCode int, err error)

	// Cipher encrypts entries and snapshots on the disk; nil: they are plain. What is there is read in either case.
	Cipher Cipher

	// The rest has defaults.
	Reserve           int64                 // bytes; below zero: none
	FreeSpace         func() (int64, error) // bytes free on the log's disk; the default asks the file system
	Now               func() time.Time      // time that entries carry
	Timing            Timing
	SnapshotThreshold uint64 // entries after which a snapshot is taken
	SnapshotBytes     int64  // bytes of entries after which one is taken, too; as many as the last snapshot has, if that is larger
	TrailingLogs      uint64 // entries kept behind a snapshot for managers that lag
}

// Cipher encrypts and decrypts. Both sides say the same of what the data is (bound), so that nothing can be put in another's place.
type Cipher interface {
	Seal(plain, bound []byte) []byte
	Unseal(sealed, bound []byte) ([]byte, error)
}

// Timing of elections. See DESIGN.md for what the defaults are measured against.
type Timing struct {
	Heartbeat time.Duration // without a word from the leader: start an election
	Election  time.Duration
	Lease     time.Duration // without a word from a majority: step down; at most Heartbeat
	Commit    time.Duration // idle followers hear of commits at least this often
	RPC       time.Duration // one round trip to another manager
}

func (c *Config) fill() error {
	switch {
	case c.NodeID == "" || c.Dir == "" || c.Stream == nil || c.Advertise == "" || c.Store == nil || c.Fatal == nil:
		return errors.New("consensus: NodeID, Dir, Stream, Advertise, Store and Fatal are required")
	case c.Logger == nil:
		c.Logger = slog.Default()
	}
	if c.Reserve == 0 {
		c.Reserve = DefaultReserve
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.FreeSpace == nil {
		c.FreeSpace = func() (int64, error) { return freeSpace(c.Dir) }
	}
	if c.Timing == (Timing{}) {
		c.Timing = Timing{Heartbeat: 800 * time.Millisecond, Election: 800 * time.Millisecond, Lease: 750 * time.Millisecond,
			Commit: 25 * time.Millisecond, RPC: 5 * time.Second}
	}
	if c.SnapshotThreshold == 0 {
		c.SnapshotThreshold = 8192
	}
	if c.SnapshotBytes == 0 {
		c.SnapshotBytes = minGrowth
	}
	if c.TrailingLogs == 0 {
		c.TrailingLogs = 4096
	}
	c.Logger = c.Logger.With("component", "consensus")
	return nil
}

// Node is this manager's part in the Raft group.
type Node struct {
	cfg       Config
	log       *slog.Logger
	raft      *raft.Raft
	transport *raft.NetworkTransport
	logs      *logStore
	snaps     *snapshots
	progress  *progress
	reserve   *reserve
	queue     *queue
	growth    *growth
	leaders   *leadership
	stalls    stalls
	handed    time.Time // when the leadership was last handed over for want of room; proposeLoop's alone, as is handing
	handing   raft.Future

	notify chan bool     // from raft
	closed chan struct{} // closed first of all by Close
	once   sync.Once
	wg     sync.WaitGroup
}

// Open opens or creates the log in Dir and takes part in the group it knows. A new log belongs to no group: call Bootstrap, or have
// the leader's AddVoter called. The node is the store's proposer from now on.
func Open(cfg Config) (*Node, error) {
	if err := cfg.fill(); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("open raft log: %w", err)
	}
	if err := os.Chmod(cfg.Dir, 0o700); err != nil { // the log holds the cluster's keys
		return nil, fmt.Errorf("open raft log: %w", err)
	}
	n := &Node{cfg: cfg, log: cfg.Logger, notify: make(chan bool, 16), closed: make(chan struct{})}
	n.progress = newProgress()
	n.growth = newGrowth(cfg.SnapshotBytes)
	n.reserve = newReserve(cfg, n.log)
	var err error
	if n.logs, err = openLogStore(filepath.Join(cfg.Dir, "raft.db"), n.progress, n.reserve, cfg.Cipher, n.die); err != nil {
		return nil, err
	}
	if err := n.start(); err != nil {
		return nil, errors.Join(err, n.logs.Close())
	}
	n.cfg.Store.SetProposer(n)
	return n, nil
}

func (n *Node) start() error {
	logger := newLogger(n.log)
	files, err := raft.NewFileSnapshotStoreWithLogger(n.cfg.Dir, 2, logger)
	if err != nil {
		return fmt.Errorf("open raft snapshots in %s: %w", n.cfg.Dir, err)
	}
	n.snaps = &snapshots{files: files, cipher: n.cfg.Cipher}
	cache, err := raft.NewLogCache(512, n.logs)
	if err != nil {
		return fmt.Errorf("open raft log: %w", err)
	}
	n.transport = raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{
		Stream: advertised{n.cfg.Stream, n.cfg.Advertise}, MaxPool: 3, Timeout: n.cfg.Timing.RPC, Logger: logger, MsgpackUseNewTimeFormat: true,
	})
	conf := raft.DefaultConfig()
	conf.LocalID = raft.ServerID(n.cfg.NodeID)
	conf.HeartbeatTimeout, conf.ElectionTimeout = n.cfg.Timing.Heartbeat, n.cfg.Timing.Election
	conf.LeaderLeaseTimeout, conf.CommitTimeout = n.cfg.Timing.Lease, n.cfg.Timing.Commit
	conf.MaxAppendEntries = 64
	conf.BatchApplyCh = true
	conf.SnapshotThreshold, conf.TrailingLogs = n.cfg.SnapshotThreshold, n.cfg.TrailingLogs
	conf.SnapshotInterval = 30 * time.Second
	conf.NotifyCh = n.notify
	conf.Logger = logger
	conf.NoLegacyTelemetry = true
	n.raft, err = raft.NewRaft(conf, &machine{n}, cache, n.logs, n.snaps, n.transport)
	if err != nil {
		return errors.Join(fmt.Errorf("start raft in %s: %w", n.cfg.Dir, err), n.transport.Close())
	}
	n.queue = newQueue()
	n.leaders = newLeadership()
	n.stalls.look(time.Now())
	n.wg.Add(5)
	go n.snapshotLoop()
	go n.stallLoop()
	go n.proposeLoop()
	go n.leaderLoop()
	go n.pulseLoop()
	return nil
}

// Close leaves the group for now: the node stays a member. It waits for everything it started.
func (n *Node) Close() error {
	var err error
	n.once.Do(func() {
		close(n.closed)
		n.cfg.Store.SetProposer(nil)
		err = n.raft.Shutdown().Error()
		n.wg.Wait()
		err = errors.Join(err, n.transport.Close(), n.logs.Close())
	})
	return err
}

// die reports a fatal condition and, where Fatal returns (in tests), keeps the caller from going on until Close.
func (n *Node) die(code int, err error) {
	n.log.Error("the process must end", "error", err, "exit_code", code)
	n.cfg.Fatal(code, err)
	<-n.closed
}

// unavailable is the kind of all errors that say: try again, perhaps on another manager.
func unavailable(format string, args ...any) error {
	return api.Errorf(errdefs.ErrUnavailable, format, args...)
}

// mapError gives raft's errors a kind and the reader a cause.
func (n *Node) mapError(doing string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, raft.ErrNotLeader):
		return n.notLeader(doing)
	case errors.Is(err, raft.ErrLeadershipLost), errors.Is(err, raft.ErrAbortedByRestore):
		return unavailable("%s: this manager lost the leadership meanwhile; whether it was done is unknown: look, then try again", doing)
	case errors.Is(err, raft.ErrLeadershipTransferInProgress):
		return unavailable("%s: the leadership is being handed to another manager: try again", doing)
	case errors.Is(err, raft.ErrRaftShutdown):
		return unavailable("%s: this manager is stopping", doing)
	case errors.Is(err, raft.ErrEnqueueTimeout):
		return unavailable("%s: this manager is overloaded: try again", doing)
	}
	return fmt.Errorf("%s: %w", doing, err)
}

func (n *Node) notLeader(doing string) error {
	if addr, id := n.raft.LeaderWithID(); addr != "" && string(id) != n.cfg.NodeID {
		return unavailable("%s: this manager is not the leader; the leader is %s at %s", doing, id, addr)
	}
	return unavailable("%s: the cluster has no leader: a majority of its managers must be up and reach each other", doing)
}

// wait waits for a future of raft, at most as long as ctx.
func wait(ctx context.Context, f raft.Future) error {
	done := make(chan error, 1)
	go func() { done <- f.Error() }() // raft answers every future, at the latest when it is shut down
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}
