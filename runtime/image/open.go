package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"github.com/containerd/errdefs"
	clog "github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	"github.com/sirupsen/logrus"
	bolt "go.etcd.io/bbolt"
)

const (
	namespace   = "skein"
	snapshotter = "overlayfs"
	lockWait    = 5 * time.Second // a daemon that just ended may still hold the database
	unpackers   = 2               // layers extracted at once in the whole store: extraction is bound by the processor
)

// Config of a Store.
type Config struct {
	// Root is the directory of everything. It is created 0700 and must be on a file system that overlayfs accepts as upper directory.
	Root string
	// Insecure names registries that may be spoken to by plain HTTP or with unknown certificates: "host", "host:port" or a CIDR.
	// 127.0.0.0/8, [::1] and localhost always are.
	Insecure []string
	// Mirrors of a registry host ("docker.io"), tried in order before it: "host:port" or "http(s)://host:port".
	Mirrors map[string][]string
	// Logger may be nil.
	Logger *slog.Logger
}

// store implements Store.
type store struct {
	root      string
	log       *slog.Logger
	bolt      *bolt.DB
	meta      *metadata.DB
	content   content.Store
	snaps     snapshots.Snapshotter
	overlay   snapshots.Snapshotter // below snaps; owns its own database
	images    images.Store
	leases    leases.Manager
	web       *web
	locks     keyLocks
	flights   flights
	details   detailCache
	unpacking chan struct{}

	// names orders changes of names and roots: a Remove must see the snapshots that a Prepare makes, and a Pull the names a Tag moves.
	names      sync.RWMutex
	collecting sync.Mutex

	ctx    context.Context // ends at Close
	cancel context.CancelFunc
	sweep  chan struct{}
	wg     sync.WaitGroup
}

// Open opens the store in cfg.Root, or makes it, and removes whatever an earlier process left half done. One process at a time may have
// it open.
func Open(cfg Config) (Store, error) {
	s, err := open(cfg)
	if err != nil {
		return nil, fmt.Errorf("open image store %s: %w", cfg.Root, diskError(cfg.Root, err))
	}
	return s, nil
}

func open(cfg Config) (_ *store, err error) {
	if !filepath.IsAbs(cfg.Root) {
		return nil, kind(errdefs.ErrInvalidArgument, "root must be an absolute path")
	}
	w, err := newWeb(cfg)
	if err != nil {
		return nil, err
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if err := os.MkdirAll(cfg.Root, 0o700); err != nil {
		return nil, err
	}
	s := &store{root: cfg.Root, log: cfg.Logger.With("component", "image"), web: w, unpacking: make(chan struct{}, unpackers), sweep: make(chan struct{}, 1)}
	s.ctx, s.cancel = context.WithCancel(s.scope(context.Background()))
	defer func() {
		if err != nil {
			s.cancel()
			err = errors.Join(err, s.closeFiles())
		}
	}()
	s.bolt, err = bolt.Open(filepath.Join(cfg.Root, "metadata.db"), 0o600, &bolt.Options{Timeout: lockWait})
	if err != nil {
		if errors.Is(err, bolt.ErrTimeout) {
			return nil, kind(errdefs.ErrFailedPrecondition, "another process has it open: stop the other daemon or use another state directory")
		}
		return nil, err
	}
	// Downloads are resumed within one pull, never over a restart. Ours alone since the database is locked.
	if err := os.RemoveAll(filepath.Join(cfg.Root, "content", "ingest")); err != nil {
		return nil, err
	}
	blobs, err := local.NewStore(filepath.Join(cfg.Root, "content"))
	if err != nil {
		return nil, err
	}
	// Short: the directories of all layers must fit into the options of one mount.
	s.overlay, err = overlay.NewSnapshotter(filepath.Join(cfg.Root, "o"))
	if err != nil {
		return nil, err
	}
	if err := s.removeUnnumbered(s.ctx, filepath.Join(cfg.Root, "o", "snapshots")); err != nil {
		return nil, err
	}
	s.meta = metadata.NewDB(s.bolt, blobs, map[string]snapshots.Snapshotter{snapshotter: s.overlay})
	if err := s.meta.Init(s.ctx); err != nil {
		return nil, err
	}
	s.content, s.snaps = s.meta.ContentStore(), s.meta.Snapshotter(snapshotter)
	s.images, s.leases = metadata.NewImageStore(s.meta), metadata.NewLeaseManager(s.meta)
	if err := s.removeLeftovers(s.ctx); err != nil {
		return nil, fmt.Errorf("remove leftovers: %w", err)
	}
	s.wg.Go(s.collectGarbage)
	return s, nil
}

// removeUnnumbered deletes the directories of snapshots that a crash left before their numbers were recorded: they would be in the way
// of the next ones with these numbers.
func (s *store) removeUnnumbered(ctx context.Context, dir string) error {
	err := s.overlay.(snapshots.Cleaner).Cleanup(ctx)
	if !errdefs.IsNotFound(err) {
		return err
	}
	// No number was ever recorded.
	return errors.Join(os.RemoveAll(dir), os.Mkdir(dir, 0o700))
}

// scope puts our namespace into ctx and keeps containerd's own log quiet: errors are returned, and one voice is enough.
func (s *store) scope(ctx context.Context) context.Context {
	quiet := logrus.New()
	quiet.SetOutput(io.Discard)
	return clog.WithLogger(namespaces.WithNamespace(ctx, namespace), logrus.NewEntry(quiet))
}

// removeLeftovers drops the claims of the process before us, and then everything that no image and no container needs. The collector
// compares the files with the database only where it saw a removal, so one is made in both places.
func (s *store) removeLeftovers(ctx context.Context) error {
	old, err := s.leases.List(ctx)
	if err != nil {
		return err
	}
	for _, l := range old {
		if err := s.leases.Delete(ctx, l); err != nil && !errdefs.IsNotFound(err) {
			return err
		}
	}
	const key = "leftovers"
	if _, err := s.snaps.Prepare(ctx, key, ""); err != nil && !errdefs.IsAlreadyExists(err) {
		return err
	}
	if err := s.snaps.Remove(ctx, key); err != nil {
		return err
	}
	probe := []byte("leftovers\n")
	d := descriptor("text/plain", probe)
	if err := content.WriteBlob(ctx, s.content, key, newReader(probe), d); err != nil {
		return err
	}
	if err := s.content.Delete(ctx, d.Digest); err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	return s.collect(ctx)
}

// collectGarbage runs a collection after each removal; several removals share one.
func (s *store) collectGarbage() {
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-s.sweep:
		}
		if err := s.collect(s.ctx); err != nil && s.ctx.Err() == nil {
			s.log.Warn("collect garbage", "error", err)
		}
	}
}

// collect frees what nothing refers to. One at a time: the files go after the database's lock is released, and who comes second must
// not return before they are gone.
func (s *store) collect(ctx context.Context) error {
	s.collecting.Lock()
	defer s.collecting.Unlock()
	_, err := s.meta.GarbageCollect(ctx)
	return err
}

// sweepSoon asks for a collection without waiting for it.
func (s *store) sweepSoon() {
	select {
	case s.sweep <- struct{}{}:
	default: // one is already asked for
	}
}

// lease claims everything that is made with the returned context until done is called.
func (s *store) lease(ctx context.Context) (_ context.Context, done func(), err error) {
	l, err := s.leases.Create(ctx, leases.WithRandomID())
	if err != nil {
		return nil, nil, err
	}
	return leases.WithLease(ctx, l.ID), func() {
		// The caller's context may be the reason for the end.
		if err := s.leases.Delete(s.scope(context.WithoutCancel(ctx)), l); err != nil {
			s.log.Warn("delete lease", "error", err)
		}
		s.sweepSoon()
	}, nil
}

// Close ends running pulls and closes the databases.
func (s *store) Close() error {
	s.cancel()
	s.flights.wait()
	s.wg.Wait()
	s.web.close()
	return s.closeFiles()
}

func (s *store) closeFiles() error {
	var errs []error
	if s.overlay != nil {
		errs = append(errs, s.overlay.Close())
	}
	if s.bolt != nil {
		errs = append(errs, s.bolt.Close())
	}
	return errors.Join(errs...)
}

// detailCache remembers what immutable bytes say, by digest of the descriptor they were reached from.
type detailCache struct {
	mu sync.Mutex
	m  map[digest.Digest]*details
}
