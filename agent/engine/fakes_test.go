package engine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/netip"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/runtime-spec/specs-go"

	"skein/overlay"
	"skein/overlay/crypt"
	"skein/runtime"
	"skein/runtime/image"
)

// fakeSupervisor keeps containers in memory. It outlives the engine of a test, as the real one outlives the daemon.
type fakeSupervisor struct {
	mu      sync.Mutex
	states  map[string]runtime.State
	configs map[string]runtime.Config
	journal []runtime.Event
	more    chan struct{} // closed and replaced with each record
	fail    map[string]error
	started func(id string) // called within Start once the process runs, before Start answers
	ignore  bool            // processes ignore SIGTERM
	calls   []string
}

func newFakeSupervisor() *fakeSupervisor {
	return &fakeSupervisor{states: map[string]runtime.State{}, configs: map[string]runtime.Config{}, more: make(chan struct{}), fail: map[string]error{}}
}

func (s *fakeSupervisor) call(op, id string) error {
	s.calls = append(s.calls, op)
	if err := s.fail[op]; err != nil {
		return err
	}
	if _, ok := s.states[id]; !ok && op != "create" {
		return cerrdefs.ErrNotFound
	}
	return nil
}

func (s *fakeSupervisor) set(op string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fail[op] = err
}

func (s *fakeSupervisor) Create(_ context.Context, c runtime.Config) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.call("create", c.ID); err != nil {
		return err
	}
	if _, ok := s.states[c.ID]; ok {
		return cerrdefs.ErrAlreadyExists
	}
	s.states[c.ID], s.configs[c.ID] = runtime.State{ID: c.ID, Status: runtime.Created, CreatedAt: time.Now()}, c
	return nil
}

func (s *fakeSupervisor) Start(_ context.Context, id string) (int, error) {
	s.mu.Lock()
	if err := s.call("start", id); err != nil {
		st := s.states[id]
		st.Status, st.Exit = runtime.Stopped, runtime.Exit{Code: 127, At: time.Now()}
		s.states[id] = st
		s.mu.Unlock()
		return 0, err
	}
	st := s.states[id]
	st.Status, st.Pid, st.StartedAt = runtime.Running, 4242, time.Now()
	s.states[id] = st
	hook := s.started
	s.mu.Unlock()
	if hook != nil {
		hook(id)
	}
	return 4242, nil
}

// exit ends the container's process and journals it.
func (s *fakeSupervisor) exit(id string, x runtime.Exit) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.exitLocked(id, x)
}

func (s *fakeSupervisor) exitLocked(id string, x runtime.Exit) {
	if x.At.IsZero() {
		x.At = time.Now()
	}
	st := s.states[id]
	st.Status, st.Exit, st.Pid = runtime.Stopped, x, 0
	s.states[id] = st
	s.record(runtime.Event{ContainerID: id, Exit: x})
}

func (s *fakeSupervisor) record(ev runtime.Event) {
	ev.Seq = uint64(len(s.journal) + 1)
	s.journal = append(s.journal, ev)
	close(s.more)
	s.more = make(chan struct{})
}

func (s *fakeSupervisor) Signal(_ context.Context, id string, sig int) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.call("signal", id); err != nil {
		return err
	}
	switch st := s.states[id]; {
	case st.Status == runtime.Stopped || st.Status == runtime.Created:
		return cerrdefs.ErrFailedPrecondition
	case sig == 9 && st.Status == runtime.Running, sig == 15 && st.Status == runtime.Running && !s.ignore:
		s.exitLocked(id, runtime.Exit{Code: 128 + sig})
	case sig == 9: // frozen: dies when it thaws
		st.Exit.Code = 137
		s.states[id] = st
	}
	return nil
}

func (s *fakeSupervisor) Pause(_ context.Context, id string) error {
	return s.become("pause", id, runtime.Paused)
}

func (s *fakeSupervisor) Resume(_ context.Context, id string) error {
	return s.become("resume", id, runtime.Running)
}

func (s *fakeSupervisor) become(op, id string, to runtime.Status) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.call(op, id); err != nil {
		return err
	}
	st := s.states[id]
	st.Status = to
	s.states[id] = st
	if st.Exit.Code == 137 && to == runtime.Running {
		s.exitLocked(id, runtime.Exit{Code: 137})
	}
	return nil
}

func (s *fakeSupervisor) Update(_ context.Context, id string, _ *specs.LinuxResources) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.call("update", id)
}

func (s *fakeSupervisor) Delete(_ context.Context, id string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.call("delete", id); err != nil {
		return err
	}
	if st := s.states[id]; st.Status == runtime.Running || st.Status == runtime.Paused {
		return cerrdefs.ErrFailedPrecondition
	}
	delete(s.states, id)
	return nil
}

func (s *fakeSupervisor) State(_ context.Context, id string) (runtime.State, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.states[id], s.call("state", id)
}

func (s *fakeSupervisor) List(context.Context) ([]runtime.State, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Collect(maps.Values(s.states)), nil
}

func (s *fakeSupervisor) Events(ctx context.Context, after uint64) (<-chan runtime.Event, error) {
	out := make(chan runtime.Event)
	go func() {
		defer close(out)
		for {
			s.mu.Lock()
			todo, more := slices.Clone(s.journal[min(int(after), len(s.journal)):]), s.more
			s.mu.Unlock()
			for _, ev := range todo {
				select {
				case out <- ev:
					after = ev.Seq
				case <-ctx.Done():
					return
				}
			}
			if len(todo) > 0 {
				continue
			}
			select {
			case <-more:
			case <-ctx.Done():
				return
			}
		}
	}()
	return out, nil
}

func (s *fakeSupervisor) Attach(ctx context.Context, id, execID string, st runtime.Streams) error {
	if st.Attached != nil {
		st.Attached()
	}
	if execID == "" {
		<-ctx.Done()
	}
	return nil
}

func (s *fakeSupervisor) Resize(context.Context, string, string, uint16, uint16) error { return nil }

// Exec runs nothing: the process ends at once with 0, or 1 when "exec-exit" is set.
func (s *fakeSupervisor) Exec(_ context.Context, id string, p runtime.Process) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.call("exec", id); err != nil {
		return 0, err
	}
	x := runtime.Exit{At: time.Now()}
	if s.fail["exec-exit"] != nil {
		x.Code = 1
	}
	s.record(runtime.Event{ContainerID: id, ExecID: p.ID, Exit: x})
	return 4343, nil
}

func (s *fakeSupervisor) SignalExec(context.Context, string, string, int) error { return nil }
func (s *fakeSupervisor) StoreFD(context.Context, string, int) error            { return nil }
func (s *fakeSupervisor) LoadFDs(context.Context, string) (map[string]int, error) {
	return nil, nil
}
func (s *fakeSupervisor) ReleaseFD(context.Context, string) error { return nil }
func (s *fakeSupervisor) Shutdown(context.Context, bool) error    { return nil }
func (s *fakeSupervisor) Close() error                            { return nil }

// fakeImages has one image, "busybox".
type fakeImages struct {
	image.Store
	mu        sync.Mutex
	img       image.Image
	snapshots map[string]bool
	layer     string
	err       error
}

func newFakeImages(t *testing.T) *fakeImages {
	img := image.Image{ID: digest.FromString("busybox")}
	img.Config.Config.Cmd = []string{"sh"}
	img.Config.Config.Env = []string{"PATH=/bin"}
	return &fakeImages{img: img, snapshots: map[string]bool{}, layer: t.TempDir()}
}

func (f *fakeImages) Get(_ context.Context, ref string) (image.Image, error) {
	if ref != "busybox" && ref != f.img.ID.String() {
		return image.Image{}, cerrdefs.ErrNotFound
	}
	return f.img, nil
}

func (f *fakeImages) List(context.Context) ([]image.Image, error) {
	return []image.Image{f.img}, nil
}

func (f *fakeImages) Prepare(_ context.Context, key string, _ image.Image) ([]runtime.Mount, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err != nil {
		return nil, f.err
	}
	f.snapshots[key] = true
	return []runtime.Mount{{Type: "bind", Source: f.layer}}, nil
}

func (f *fakeImages) Mounts(_ context.Context, key string) ([]runtime.Mount, error) {
	return []runtime.Mount{{Type: "bind", Source: f.layer}}, nil
}

func (f *fakeImages) RemoveSnapshot(_ context.Context, key string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.snapshots, key)
	return nil
}

func (f *fakeImages) Snapshots(context.Context) ([]string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Collect(maps.Keys(f.snapshots)), nil
}

// fakeNetwork keeps sandboxes in memory.
type fakeNetwork struct {
	mu       sync.Mutex
	boxes    map[string]overlay.Sandbox
	bridges  []overlay.Bridge
	inUse    map[portKey]bool
	err      error
	cryptErr error
}

func newFakeNetwork() *fakeNetwork {
	return &fakeNetwork{boxes: map[string]overlay.Sandbox{}, inUse: map[portKey]bool{}}
}

func (n *fakeNetwork) Set(context.Context, overlay.Config) (overlay.Applied, error) { return nil, nil }

func (n *fakeNetwork) AddSandbox(_ context.Context, s overlay.Sandbox) (string, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.err != nil {
		return "", n.err
	}
	if s.ID == "" {
		return "", errors.New("a sandbox without an id")
	}
	n.boxes[s.ID] = s
	return "/run/netns/" + s.ID, nil
}

func (n *fakeNetwork) RemoveSandbox(_ context.Context, id string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.boxes, id)
	return nil
}

func (n *fakeNetwork) Sandboxes() ([]string, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Collect(maps.Keys(n.boxes)), nil
}

func (n *fakeNetwork) SetBridges(_ context.Context, b []overlay.Bridge) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.bridges = b
	return n.err
}

func (n *fakeNetwork) CryptKeys() ([]crypt.Key, error)   { return nil, n.cryptErr }
func (n *fakeNetwork) CryptKeysChanged() <-chan struct{} { return nil }
func (n *fakeNetwork) Facts() (overlay.Facts, error)     { return overlay.Facts{}, nil }

func (n *fakeNetwork) PortHolder(proto string, port uint16) (string, int, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return "other", 7, n.inUse[portKey{proto, port}]
}

func (n *fakeNetwork) PortFree(proto string, _ netip.Addr, port uint16) error {
	if _, _, held := n.PortHolder(proto, port); held {
		return fmt.Errorf("other (pid 7) listens: %w", cerrdefs.ErrConflict)
	}
	return nil
}

func (n *fakeNetwork) PortUnbound(proto string, at netip.Addr, port uint16) error {
	return n.PortFree(proto, at, port)
}

func (n *fakeNetwork) SandboxPath(id string) string { return "/run/netns/" + id }

func (n *fakeNetwork) SCTP() bool { return true }

func (n *fakeNetwork) HostRoutes() ([]netip.Prefix, error) {
	return []netip.Prefix{netip.MustParsePrefix("172.18.5.0/24")}, nil
}

// bench is one node: fakes that stay, and an engine that can be started anew over them.
type bench struct {
	t      *testing.T
	dir    string
	sup    *fakeSupervisor
	images *fakeImages
	net    *fakeNetwork
	e      *Engine
	stop   func()

	cluster *fakeCluster // nil: the node is in none
}

func newBench(t *testing.T) *bench {
	t.Helper()
	b := &bench{t: t, dir: t.TempDir(), sup: newFakeSupervisor(), images: newFakeImages(t), net: newFakeNetwork()}
	b.up()
	t.Cleanup(func() { b.stop() })
	return b
}

// up starts an engine over the state directory, as a new daemon does.
func (b *bench) up() {
	b.t.Helper()
	e, err := New(Config{StateDir: b.dir, RunDir: filepath.Join(b.dir, "run"), Hostname: "node1", Images: b.images, Supervisor: b.sup, Network: b.net, Logger: slog.New(slog.NewTextHandler(io.Discard, nil))})
	if err != nil {
		b.t.Fatal(err)
	}
	if b.cluster != nil {
		e.SetCluster(b.cluster)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- e.Run(ctx) }()
	select {
	case <-e.Ready():
	case err := <-done:
		b.t.Fatalf("engine ended: %v", err)
	}
	b.e = e
	b.stop = sync.OnceFunc(func() { cancel(); <-done })
}

// restart ends the engine and starts another, as after a crash of the daemon.
func (b *bench) restart() {
	b.t.Helper()
	b.stop()
	b.up()
}

func (b *bench) create(name string, hc container.HostConfig) string {
	b.t.Helper()
	out, err := b.e.ContainerCreate(b.t.Context(), name, container.CreateRequest{Config: &container.Config{Image: "busybox"}, HostConfig: &hc}, "")
	if err != nil {
		b.t.Fatalf("create %s: %v", name, err)
	}
	return out.ID
}

func (b *bench) run(name string, hc container.HostConfig) string {
	b.t.Helper()
	id := b.create(name, hc)
	if err := b.e.ContainerStart(b.t.Context(), id); err != nil {
		b.t.Fatalf("start %s: %v", name, err)
	}
	return id
}

func (b *bench) record(id string) record {
	b.t.Helper()
	c, err := b.e.find(id)
	if err != nil {
		b.t.Fatal(err)
	}
	return c.snapshot()
}

// until waits for a change of the container that makes ok true.
func (b *bench) until(id, what string, ok func(record) bool) {
	b.t.Helper()
	c, err := b.e.find(id)
	if err != nil {
		b.t.Fatal(err)
	}
	limit := time.After(10 * time.Second)
	for {
		r, _, _, changed := c.watch()
		if ok(r) {
			return
		}
		select {
		case <-changed:
		case <-limit:
			b.t.Fatalf("container %s did not become %s: %+v", r.Name, what, r.State)
		}
	}
}
