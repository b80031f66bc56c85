package consensus

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/hashicorp/raft"
	"google.golang.org/protobuf/proto"

	"skein/manager/api"
	"skein/manager/store"
	"skein/manager/store/storetest"
)

// hub joins managers by pipes in memory; a cut manager neither hears nor is heard.
type hub struct {
	mu    sync.Mutex
	ends  map[string]*stream
	cut   map[string]bool
	deaf  map[string]bool // what is said to it is taken and never heard
	conns map[net.Conn][2]string
}

func newHub() *hub {
	return &hub{ends: map[string]*stream{}, cut: map[string]bool{}, deaf: map[string]bool{}, conns: map[net.Conn][2]string{}}
}

type stream struct {
	hub    *hub
	addr   string
	accept chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func (h *hub) listen(addr string) *stream {
	s := &stream{hub: h, addr: addr, accept: make(chan net.Conn), closed: make(chan struct{})}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ends[addr] = s
	return s
}

func (h *hub) setCut(addr string, cut bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.cut[addr] = cut
	for c, ends := range h.conns {
		if cut && (ends[0] == addr || ends[1] == addr) {
			_ = c.Close()
			delete(h.conns, c)
		}
	}
}

func (h *hub) isDeaf(addr string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.deaf[addr]
}

func (h *hub) setDeaf(addr string, deaf bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.deaf[addr] = deaf
}

func (s *stream) Dial(addr raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	s.hub.mu.Lock()
	to, cut := s.hub.ends[string(addr)], s.hub.cut[s.addr] || s.hub.cut[string(addr)]
	s.hub.mu.Unlock()
	if to == nil || cut {
		return nil, errors.New("no route to host")
	}
	here, there := net.Pipe()
	if s.hub.isDeaf(string(addr)) {
		go func() { _, _ = io.Copy(io.Discard, there) }() // ends when the dialer closes
		return here, nil
	}
	select {
	case to.accept <- there:
	case <-to.closed:
		return nil, errors.New("connection refused")
	case <-time.After(timeout):
		return nil, os.ErrDeadlineExceeded
	}
	s.hub.mu.Lock()
	defer s.hub.mu.Unlock()
	s.hub.conns[here], s.hub.conns[there] = [2]string{s.addr, string(addr)}, [2]string{s.addr, string(addr)}
	return here, nil
}

func (s *stream) Accept() (net.Conn, error) {
	select {
	case c := <-s.accept:
		return c, nil
	case <-s.closed:
		return nil, net.ErrClosed
	}
}

func (s *stream) Close() error {
	s.once.Do(func() { close(s.closed) })
	return nil
}
func (s *stream) Addr() net.Addr { return address(s.addr) }

// manager is a node under test.
type manager struct {
	*Node
	store *store.Store
	dir   string
	id    string
	fatal atomic.Int32 // exit code
	fault atomic.Pointer[error]
}

var quick = Timing{Heartbeat: 150 * time.Millisecond, Election: 150 * time.Millisecond, Lease: 100 * time.Millisecond,
	Commit: 10 * time.Millisecond, RPC: time.Second}

func (h *hub) open(t *testing.T, id, dir string, options ...func(*Config)) *manager {
	t.Helper()
	m := &manager{store: store.New(nil), dir: dir, id: id}
	cfg := Config{NodeID: id, Dir: dir, Stream: h.listen(id), Advertise: id, Store: m.store, Timing: quick, Reserve: -1,
		Logger: slog.New(slog.NewTextHandler(io.Discard, nil)), Fatal: func(code int, err error) { m.fatal.Store(int32(code)) }}
	for _, o := range options {
		o(&cfg)
	}
	n, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	m.Node = n
	n.logs.fault = func() error {
		if e := m.fault.Load(); e != nil {
			return *e
		}
		return nil
	}
	t.Cleanup(func() { _ = n.Close() })
	return m
}

func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// eventually polls: raft has no event for "somebody else leads".
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(15 * time.Second); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within 15 s: %s", what)
		}
	}
}

func (h *hub) bootstrapped(t *testing.T, id string, options ...func(*Config)) *manager {
	t.Helper()
	m := h.open(t, id, t.TempDir(), options...)
	if err := m.Bootstrap(); err != nil {
		t.Fatal(err)
	}
	if !<-m.LeaderCh() {
		t.Fatal("told of a loss first")
	}
	return m
}

func (h *hub) three(t *testing.T, options ...func(*Config)) []*manager {
	t.Helper()
	ms := []*manager{h.bootstrapped(t, "m1", options...)}
	for _, id := range []string{"m2", "m3"} {
		m := h.open(t, id, t.TempDir(), options...)
		if err := ms[0].AddVoter(within(t), id, id); err != nil {
			t.Fatal(err)
		}
		ms = append(ms, m)
	}
	return ms
}

func leader(t *testing.T, ms []*manager) (l *manager) {
	t.Helper()
	eventually(t, "a leader that a majority confirms", func() bool {
		for _, m := range ms {
			ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
			defer cancel()
			if m.IsLeader() && m.Linearizable(ctx) == nil {
				l = m
				return true
			}
		}
		return false
	})
	return l
}

func node(id string) *api.Txn {
	return &api.Txn{Changes: []*api.Change{{Kind: &api.Change_PutNode{PutNode: &api.NodeRecord{Id: id, Hostname: id}}}}}
}

func (m *manager) has(id string) (has bool) {
	m.store.View(func(tx store.ReadTx) { has = tx.Node(id) != nil })
	return has
}

func same(t *testing.T, ms []*manager) {
	t.Helper()
	eventually(t, "equal versions", func() bool {
		for _, m := range ms {
			if m.store.Version() != ms[0].store.Version() {
				return false
			}
		}
		return true
	})
	for _, m := range ms {
		if m.store.Hash() != ms[0].store.Hash() {
			t.Errorf("%s and %s hold different states at version %d", m.id, ms[0].id, m.store.Version())
		}
	}
}

func TestRestartFromDisk(t *testing.T) {
	h := newHub()
	m := h.bootstrapped(t, "m1")
	for i := range 20 {
		if _, _, err := m.store.Batch(within(t), []*api.Txn{node(fmt.Sprint("n", i))}); err != nil {
			t.Fatal(err)
		}
	}
	if err := m.Bootstrap(); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a second bootstrap: %v", err)
	}
	hash := m.store.Hash()
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	if _, _, err := m.store.Batch(within(t), []*api.Txn{node("late")}); !errdefs.IsUnavailable(err) {
		t.Errorf("a write after the end: %v", err)
	}
	again := h.open(t, "m1", m.dir)
	if has, err := again.HasState(); !has || err != nil {
		t.Errorf("HasState %v, %v", has, err)
	}
	if !<-again.LeaderCh() {
		t.Error("told of a loss")
	}
	if again.store.Hash() != hash {
		t.Error("the restarted manager holds something else")
	}
}

func TestSecondProcessIsRefused(t *testing.T) {
	h := newHub()
	m := h.bootstrapped(t, "m1")
	_, err := Open(Config{NodeID: "m1", Dir: m.dir, Stream: h.listen("x"), Advertise: "x", Store: store.New(nil), Fatal: func(int, error) {}, Reserve: -1})
	if err == nil {
		t.Fatal("two nodes share a log")
	}
	t.Log(err)
}

// TestLeaderKilled wants every acknowledged write on the survivors, and on all after the killed one came back.
func TestLeaderKilled(t *testing.T) {
	h := newHub()
	ms := h.three(t)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	var mu sync.Mutex
	var acked []string
	for w := range 4 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for i := 0; ; i++ {
				id := fmt.Sprintf("w%d-%d", w, i)
				for {
					select {
					case <-stop:
						return
					default:
					}
					ctx, cancel := context.WithTimeout(context.Background(), time.Second)
					err := errors.New("no leader")
					for _, m := range ms {
						if m.IsLeader() {
							_, _, err = m.store.Batch(ctx, []*api.Txn{node(id)})
							break
						}
					}
					cancel()
					if err == nil {
						mu.Lock()
						acked = append(acked, id)
						mu.Unlock()
						break
					}
					time.Sleep(time.Millisecond)
				}
			}
		}()
	}
	count := func() int { mu.Lock(); defer mu.Unlock(); return len(acked) }
	eventually(t, "200 writes", func() bool { return count() > 200 })
	old := leader(t, ms)
	start := time.Now()
	h.setCut(old.id, true)
	_ = old.Close()
	before := count()
	eventually(t, "writes through a new leader", func() bool { return count() > before+100 })
	t.Logf("100 writes after the leader's end took %v", time.Since(start))
	close(stop)
	wg.Wait()

	h.setCut(old.id, false)
	var all []*manager
	for _, m := range ms {
		if m == old {
			m = h.open(t, old.id, old.dir)
		}
		all = append(all, m)
	}
	l := leader(t, all)
	same(t, append([]*manager{l}, all...))
	for _, id := range acked {
		if !l.has(id) {
			t.Errorf("acknowledged write %s is lost", id)
		}
	}
	t.Logf("%d acknowledged writes are there", len(acked))
}

func TestCutLeaderNeitherWritesNorReads(t *testing.T) {
	h := newHub()
	ms := h.three(t)
	old := leader(t, ms)
	h.setCut(old.id, true)
	ctx, cancel := context.WithTimeout(within(t), 3*time.Second)
	defer cancel()
	// An answer to the last heartbeat may just have come: no second one can.
	if err := old.Linearizable(ctx); err == nil && old.Linearizable(ctx) == nil {
		t.Error("a read was served without a majority")
	}
	if _, _, err := old.store.Batch(ctx, []*api.Txn{node("lost")}); err == nil {
		t.Error("a write was acknowledged without a majority")
	}
	var rest []*manager
	for _, m := range ms {
		if m != old {
			rest = append(rest, m)
		}
	}
	l := leader(t, rest)
	if _, _, err := l.store.Batch(ctx, []*api.Txn{node("kept")}); err != nil {
		t.Fatal(err)
	}
	h.setCut(old.id, false)
	same(t, ms)
	if old.has("lost") || !old.has("kept") {
		t.Error("the returned manager kept its own write or lacks the other's")
	}
	if err := old.Linearizable(ctx); !errdefs.IsUnavailable(err) {
		t.Errorf("a follower's read: %v", err)
	}
}

func TestCatchUpBySnapshot(t *testing.T) {
	h := newHub()
	ms := h.three(t, encrypted(t), func(c *Config) { c.SnapshotThreshold, c.TrailingLogs = 20, 5 })
	l := leader(t, ms)
	away := ms[0]
	if away == l {
		away = ms[1]
	}
	h.setCut(away.id, true)
	for i := range 60 {
		if _, _, err := l.store.Batch(within(t), []*api.Txn{node(fmt.Sprint("n", i))}); err != nil {
			t.Fatal(err)
		}
	}
	for _, m := range ms {
		if m != away {
			if err := m.raft.Snapshot().Error(); err != nil {
				t.Fatal(err)
			}
		}
	}
	w := away.store.Watch()
	h.setCut(away.id, false)
	same(t, ms)
	if _, overflow := w.Take(); !overflow {
		t.Error("a watcher was not told that a snapshot replaced everything")
	}
	for _, m := range ms { // and a restart from the snapshot
		_ = m.Close()
	}
	again := []*manager{h.open(t, "m1", ms[0].dir, encrypted(t)), h.open(t, "m2", ms[1].dir, encrypted(t)), h.open(t, "m3", ms[2].dir, encrypted(t))}
	leader(t, again)
	same(t, append(again, l))
}

func TestMembership(t *testing.T) {
	h := newHub()
	ms := h.three(t)
	l := leader(t, ms)
	if err := l.AddVoter(within(t), "m9", "m9"); !errdefs.IsUnavailable(err) {
		t.Errorf("an unreachable manager: %v", err)
	}
	peers, err := l.Peers()
	if err != nil || len(peers) != 3 || !peers[2].Voter {
		t.Fatalf("peers %v, %v", peers, err)
	}
	if err := l.TransferLeadership(within(t)); err != nil {
		t.Fatal(err)
	}
	next := leader(t, ms)
	if next == l {
		t.Fatal("leadership was not handed over")
	}
	if leads := <-l.LeaderCh(); leads { // m1 was told of its gain by three()
		t.Error("the old leader was not told")
	}
	if err := next.RemoveServer(within(t), l.id); err != nil {
		t.Fatal(err)
	}
	if err := l.AddVoter(within(t), "m4", "m4"); !errdefs.IsUnavailable(err) {
		t.Errorf("a removed manager adds another: %v", err)
	}
	if peers, _ := next.Peers(); len(peers) != 2 {
		t.Errorf("peers %v", peers)
	}
}

// TestNewManagerVotesOnceItHasTheLog: a manager that is reachable but does not take the log in costs the group nothing; once it does, it gets
// its vote, also when many entries come meanwhile.
func TestNewManagerVotesOnceItHasTheLog(t *testing.T) {
	h := newHub()
	one := h.open(t, "m1", t.TempDir(), func(c *Config) { c.Timing.RPC = 200 * time.Millisecond })
	if err := one.Bootstrap(); err != nil {
		t.Fatal(err)
	}
	leader(t, []*manager{one})
	two := h.open(t, "m2", t.TempDir())
	h.setDeaf("m2", true)
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if err := one.AddVoter(ctx, "m2", "m2"); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "not a voter yet") {
		t.Fatalf("a manager that does not hear: %v", err)
	}
	peers, err := one.Peers()
	if err != nil || len(peers) != 2 || peers[1].Voter {
		t.Fatalf("peers %v, %v", peers, err)
	}
	write := func(id string) {
		t.Helper()
		if _, _, err := one.store.Batch(within(t), []*api.Txn{node(id)}); err != nil {
			t.Fatalf("the group stands still because of a manager without the log: %v", err)
		}
	}
	for i := range 50 {
		write(fmt.Sprint("a", i))
	}
	h.setDeaf("m2", false)
	busy, stop := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(busy)
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
				_, _, _ = one.store.Batch(context.Background(), []*api.Txn{node(fmt.Sprint("b", i))})
			}
		}
	}()
	err = one.AddVoter(within(t), "m2", "m2")
	close(stop)
	<-busy
	if err != nil {
		t.Fatal(err)
	}
	if peers, err = one.Peers(); err != nil || !peers[1].Voter {
		t.Fatalf("peers %v, %v", peers, err)
	}
	same(t, []*manager{one, two})
	if err := one.AddVoter(within(t), "m2", "m2"); err != nil {
		t.Errorf("again: %v", err)
	}
}

func TestDiskReserve(t *testing.T) {
	h := newHub()
	var free atomic.Int64
	free.Store(100 << 20)
	m := h.bootstrapped(t, "m1", func(c *Config) {
		c.Reserve = 1 << 20
		c.FreeSpace = func() (int64, error) { return free.Load(), nil }
	})
	write := func() error {
		_, _, err := m.store.Batch(within(t), []*api.Txn{node("n1")})
		return err
	}
	if err := write(); err != nil {
		t.Fatal(err)
	}
	free.Store(1 << 19)
	if err := write(); !errdefs.IsResourceExhausted(err) {
		t.Errorf("a write on a full disk: %v", err)
	} else {
		t.Log(err)
	}
	if err := m.Linearizable(within(t)); err != nil {
		t.Errorf("a read on a full disk: %v", err)
	}
	free.Store(100 << 20)
	if err := write(); err != nil {
		t.Errorf("a write after space came back: %v", err)
	}
	// Somebody else filled the disk beyond the reserve: its file is given back and the write goes through.
	full := error(syscall.ENOSPC)
	m.fault.Store(&full)
	reserve := filepath.Join(m.dir, "reserve")
	m.logs.fault = func() error {
		if _, err := os.Stat(reserve); err == nil {
			return fmt.Errorf("write: %w", syscall.ENOSPC)
		}
		return nil
	}
	if err := write(); err != nil {
		t.Errorf("a write into the reserve: %v", err)
	}
	if _, err := os.Stat(reserve); !os.IsNotExist(err) {
		t.Errorf("the reserve is still there: %v", err)
	}
	m.logs.fault = nil
	if err := write(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(reserve); err != nil {
		t.Errorf("the reserve did not come back: %v", err)
	}
	if m.fatal.Load() != 0 {
		t.Error("a full disk ended the process")
	}
}

// A leader that alone has no room lets another one lead; when all are full the writer is told so.
func TestFullLeaderHandsOver(t *testing.T) {
	h := newHub()
	free := map[string]*atomic.Int64{}
	option := func(c *Config) {
		room := &atomic.Int64{}
		room.Store(100 << 20)
		free[c.NodeID] = room
		c.Reserve, c.FreeSpace = 1<<20, func() (int64, error) { return room.Load(), nil }
	}
	all := []*manager{h.bootstrapped(t, "m1", option)}
	for _, id := range []string{"m2", "m3"} {
		all = append(all, h.open(t, id, t.TempDir(), option))
		if err := all[0].AddVoter(within(t), id, id); err != nil {
			t.Fatal(err)
		}
	}
	write := func(m *manager, id string) error {
		_, _, err := m.store.Batch(within(t), []*api.Txn{node(id)})
		return err
	}
	if err := write(all[0], "n1"); err != nil {
		t.Fatal(err)
	}
	free["m1"].Store(1 << 19)
	if err := write(all[0], "n2"); !errdefs.IsUnavailable(err) || !api.IsNotDone(err) {
		t.Errorf("a write at the full leader: %v, want one that may be sent again", err)
	}
	lead := leader(t, all[1:])
	if err := write(lead, "n3"); err != nil {
		t.Errorf("a write at the next leader: %v", err)
	}
	// It had room and leads again: the next time is no worse than the first.
	free["m1"].Store(100 << 20)
	if err := lead.raft.LeadershipTransferToServer("m1", "m1").Error(); err != nil {
		t.Fatal(err)
	}
	if err := write(leader(t, all[:1]), "n5"); err != nil {
		t.Fatal(err)
	}
	free["m1"].Store(1 << 19)
	if err := write(all[0], "n6"); !errdefs.IsUnavailable(err) || !api.IsNotDone(err) {
		t.Errorf("a write when the disk is full for the second time: %v, want one that may be sent again", err)
	}
	for _, f := range free {
		f.Store(1 << 19)
	}
	var last error
	for range 4 {
		lead = leader(t, all)
		if last = write(lead, "n4"); errdefs.IsResourceExhausted(last) {
			break
		}
	}
	if !errdefs.IsResourceExhausted(last) {
		t.Errorf("a write while all disks are full: %v, want resource exhausted", last)
	}
}

func TestFailedSyncEndsTheProcess(t *testing.T) {
	h := newHub()
	m := h.bootstrapped(t, "m1")
	eio := fmt.Errorf("fdatasync: %w", syscall.EIO)
	m.fault.Store(&eio)
	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	defer cancel()
	if _, _, err := m.store.Batch(ctx, []*api.Txn{node("n1")}); err == nil {
		t.Error("a write was acknowledged after a failed fsync")
	}
	if code := m.fatal.Load(); code != ExitStorage {
		t.Errorf("exit code %d", code)
	}
}

func TestNewerEntryEndsTheProcess(t *testing.T) {
	h := newHub()
	m := h.bootstrapped(t, "m1")
	entry, err := proto.Marshal(&api.Entry{Format: api.FormatV1, Level: api.FeatureLevel + 1, Txns: []*api.Txn{node("n1")}})
	if err != nil {
		t.Fatal(err)
	}
	m.raft.Apply(entry, time.Second)
	eventually(t, "an exit code", func() bool { return m.fatal.Load() == ExitTooOld })
	if m.has("n1") {
		t.Error("the entry was applied")
	}
}

func TestDamagedLogIsSeen(t *testing.T) {
	h := newHub()
	m := h.bootstrapped(t, "m1")
	if _, _, err := m.store.Batch(within(t), []*api.Txn{node("a-rather-special-name")}); err != nil {
		t.Fatal(err)
	}
	_ = m.Close()
	path := filepath.Join(m.dir, "raft.db")
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i+12 < len(b); i++ {
		if string(b[i:i+12]) == "a-rather-spe" {
			b[i] ^= 1
		}
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	code := make(chan int, 8)
	opened := make(chan struct{})
	release := make(chan struct{})
	go func() {
		defer close(opened)
		n, err := Open(Config{NodeID: "m1", Dir: m.dir, Stream: h.listen("m1"), Advertise: "m1", Store: store.New(nil), Timing: quick, Reserve: -1,
			Logger: slog.New(slog.NewTextHandler(io.Discard, nil)), Fatal: func(c int, err error) { code <- c; <-release }})
		if err == nil {
			_ = n.Close()
		}
	}()
	select {
	case c := <-code:
		if c != ExitStorage {
			t.Errorf("exit code %d", c)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("the damage was not seen")
	}
}

func TestGathering(t *testing.T) {
	h := newHub()
	m := h.bootstrapped(t, "m1")
	before := m.raft.LastIndex()
	var wg sync.WaitGroup
	const writers = 200
	for i := range writers {
		wg.Add(1)
		go func() {
			defer wg.Done()
			if _, results, err := m.store.Batch(within(t), []*api.Txn{node(fmt.Sprint("n", i))}); err != nil || results[0] != nil {
				t.Errorf("write %d: %v %v", i, results, err)
			}
		}()
	}
	wg.Wait()
	if entries := m.raft.LastIndex() - before; entries > writers/4 {
		t.Errorf("%d entries for %d writes", entries, writers)
	} else {
		t.Logf("%d entries for %d writes", entries, writers)
	}
	// One call of many: order and results are kept across entries.
	var txns []*api.Txn
	for i := range 3000 {
		txns = append(txns, &api.Txn{Changes: []*api.Change{
			{Kind: &api.Change_Expect{Expect: &api.Expect{Kind: "node", Id: fmt.Sprint("b", i/2), Version: 0}}},
			{Kind: &api.Change_PutNode{PutNode: &api.NodeRecord{Id: fmt.Sprint("b", i/2), Hostname: fmt.Sprintf("host-%0300d", i)}}},
		}})
	}
	_, results, err := m.store.Batch(within(t), txns)
	if err != nil {
		t.Fatal(err)
	}
	for i, r := range results {
		if (i%2 == 0) != (r == nil) || (i%2 == 1 && !errdefs.IsAlreadyExists(r)) {
			t.Fatalf("result %d: %v", i, r)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, _, err := m.store.Batch(ctx, []*api.Txn{node("never")}); !errors.Is(err, context.Canceled) || m.has("never") {
		t.Errorf("a cancelled write: %v", err)
	}
}

func TestLeadershipIsToldInOrder(t *testing.T) {
	for _, c := range []struct {
		seen   []bool // taken by the reader before the pushes
		pushed []bool
		want   []bool
	}{
		{nil, []bool{true}, []bool{true}},
		{nil, []bool{true, false}, nil},
		{nil, []bool{true, false, true}, []bool{true}},
		{[]bool{true}, []bool{false, true}, []bool{false, true}},
		{[]bool{true}, []bool{false, true, false}, []bool{false}},
		{[]bool{true}, []bool{false, true, false, true}, []bool{false, true}},
	} {
		l := newLeadership()
		for _, v := range c.pushed {
			l.push(v)
		}
		if len(l.queue) != len(c.want) {
			t.Errorf("after %v, pushed %v: queue %v, want %v", c.seen, c.pushed, l.queue, c.want)
			continue
		}
		for i := range c.want {
			if l.queue[i] != c.want[i] {
				t.Errorf("after %v, pushed %v: queue %v, want %v", c.seen, c.pushed, l.queue, c.want)
			}
		}
	}
}

func TestProposer(t *testing.T) {
	storetest.TestProposer(t, func(t *testing.T) *store.Store { return newHub().bootstrapped(t, "m1").store })
}

// TestMixedVersions: while a manager is older, nothing that it does not know is written, and it can be sent a snapshot; once the cluster's
// level is above its own it stops, whoever takes its place with the newer version goes on from its log.
func TestMixedVersions(t *testing.T) {
	h := newHub()
	calm := func(c *Config) { // it is not about elections
		c.Timing = Timing{Heartbeat: 2 * time.Second, Election: 2 * time.Second, Lease: 2 * time.Second, Commit: 10 * time.Millisecond, RPC: 5 * time.Second}
	}
	old := func(c *Config) {
		calm(c)
		c.Store = store.NewAt(nil, api.LevelPacked-1)
	}
	ms := []*manager{h.bootstrapped(t, "m1", calm), h.open(t, "m2", t.TempDir(), calm)}
	write := func(txns ...*api.Txn) {
		t.Helper()
		_, results, err := leader(t, ms[:2]).store.Batch(within(t), txns)
		if err := errors.Join(append(results, err)...); err != nil {
			t.Fatal(err)
		}
	}
	one := func(c *api.Change) *api.Txn { return &api.Txn{Changes: []*api.Change{c}} }
	level := func(l uint32) *api.Txn {
		return one(&api.Change{Kind: &api.Change_PutCluster{PutCluster: &api.ClusterRecord{Id: "c1", FeatureLevel: l}}})
	}
	tasks := func(lo, hi uint64) *api.Txn {
		c := &api.TaskCreate{ServiceId: "s1", Revision: 1}
		for slot := lo; slot <= hi; slot++ {
			c.Items = append(c.Items, &api.TaskCreate_Item{Slot: slot, Generation: 1})
		}
		return one(&api.Change{Kind: &api.Change_CreateTasks{CreateTasks: c}})
	}
	write(level(api.LevelPacked-1), one(&api.Change{Kind: &api.Change_PutService{PutService: &api.ServiceRecord{Id: "s1", SpecJson: []byte(`{"Name":"s1"}`)}}}), tasks(1, 50))
	if err := ms[0].raft.Snapshot().Error(); err != nil { // what the others join from
		t.Fatal(err)
	}
	m3 := h.open(t, "m3", t.TempDir(), old)
	for _, m := range []*manager{ms[1], m3} {
		if err := ms[0].AddVoter(within(t), m.id, m.id); err != nil {
			t.Fatal(err)
		}
	}
	m3.store = m3.cfg.Store
	write(tasks(51, 100))
	same(t, append(ms, m3))
	if m3.fatal.Load() != 0 {
		t.Fatalf("the older manager stopped with exit code %d", m3.fatal.Load())
	}
	write(level(api.LevelPacked))
	eventually(t, "the older manager's exit code", func() bool { return m3.fatal.Load() == ExitTooOld })
	write(tasks(101, 150))
	_ = m3.Close()
	again := h.open(t, "m3", m3.dir, calm)
	same(t, append(ms, again))
	again.store.View(func(tx store.ReadTx) {
		if tx.CountTasks() != 150 {
			t.Errorf("%d tasks", tx.CountTasks())
		}
	})
	_ = again.Close()
	before := h.open(t, "m3", m3.dir, old) // a downgrade
	eventually(t, "the downgraded manager's exit code", func() bool { return before.fatal.Load() == ExitTooOld })
}

// TestSnapshotBySize: a log of few, large entries is cut, too; and not again before it has grown as much as the snapshot is large.
func TestSnapshotBySize(t *testing.T) {
	h := newHub()
	m := h.bootstrapped(t, "m1", func(c *Config) { c.SnapshotBytes = 64 << 10 })
	fill := func(from, to int) {
		t.Helper()
		for i := from; i < to; i++ {
			big := node(fmt.Sprint("n", i))
			big.Changes[0].GetPutNode().DescriptionJson = make([]byte, 20<<10)
			if _, _, err := m.store.Batch(within(t), []*api.Txn{big}); err != nil {
				t.Fatal(err)
			}
		}
	}
	snapshots := func() int {
		list, err := m.snaps.List()
		if err != nil {
			t.Fatal(err)
		}
		return len(list)
	}
	fill(0, 3)
	if snapshots() != 0 {
		t.Fatal("a snapshot of a small log")
	}
	fill(3, 40)
	eventually(t, "a snapshot", func() bool { return snapshots() > 0 })
	m.growth.mu.Lock()
	last, pending := m.growth.last, m.growth.bytes
	m.growth.mu.Unlock()
	if last < 60<<10 || pending > 40*21<<10 {
		t.Errorf("snapshot of %d bytes, %d since", last, pending)
	}
	hash := m.store.Hash()
	_ = m.Close()
	if again := h.open(t, "m1", m.dir); !<-again.LeaderCh() || again.store.Hash() != hash {
		t.Error("the restarted manager holds something else")
	}
}
