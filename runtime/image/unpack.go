package image

import (
	"context"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"skein/runtime/layer"
)

// maxReserve is left free on the disk by unpacking, or a fiftieth of it when it is small.
const maxReserve = 256 << 20

// unpack extracts layer i of d over those below it, straight into the snapshot's directory: nothing is mounted. It tells whether the
// layer is new. What a crash leaves is an unfinished snapshot that nothing refers to.
func (s *store) unpack(ctx context.Context, d *details, i int, report func(Progress)) (fresh bool, err error) {
	id, chain, parent := shortID(d.layers[i].Digest), d.chain[i].String(), ""
	if i > 0 {
		parent = d.chain[i-1].String()
	}
	unlock, err := s.locks.lock(ctx, "unpack "+chain)
	if err != nil {
		return false, err
	}
	defer unlock()
	key := "unpack-" + strconv.FormatInt(time.Now().UnixNano(), 36) + "-" + chain
	// The label makes an existing layer ours by the lease, in the same transaction that finds it.
	mounts, err := s.snaps.Prepare(ctx, key, parent, snapshots.WithLabels(map[string]string{"containerd.io/snapshot.ref": chain}))
	if errdefs.IsAlreadyExists(err) {
		report(Progress{ID: id, Action: "Already exists"})
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer func() {
		if err != nil {
			_ = s.snaps.Remove(s.scope(context.WithoutCancel(ctx)), key) // unreferenced: the collector takes it otherwise
		}
	}()
	select {
	case s.unpacking <- struct{}{}:
		defer func() { <-s.unpacking }()
	case <-ctx.Done():
		return false, context.Cause(ctx)
	}
	if err := s.extract(ctx, d, i, mounts, report); err != nil {
		return false, err
	}
	if err := s.snaps.Commit(ctx, chain, key); err != nil {
		return false, err
	}
	report(Progress{ID: id, Action: "Pull complete"})
	return true, nil
}

func (s *store) extract(ctx context.Context, d *details, i int, mounts []mount.Mount, report func(Progress)) error {
	upper, lowers, err := directories(mounts)
	if err != nil {
		return err
	}
	l := d.layers[i]
	ra, err := s.content.ReaderAt(ctx, ocispec.Descriptor{Digest: l.Digest, Size: l.Size})
	if err != nil {
		return err
	}
	defer ra.Close()
	in := &progressReader{r: content.NewReader(ra), total: l.Size, id: shortID(l.Digest), report: report}
	z, err := layer.Decompress(in)
	if err != nil {
		return err
	}
	defer z.Close()
	res, err := layer.Apply(ctx, upper, z, layer.Options{Lowers: lowers, Check: s.checkDisk})
	if err != nil {
		return diskError(s.root, err)
	}
	if want := d.config.RootFS.DiffIDs[i]; res.DiffID != want {
		return kind(errdefs.ErrDataLoss, "unpacks to %s, the config says %s", res.DiffID, want)
	}
	return nil
}

// directories finds in a snapshot's mounts where its own files and those of its parents are.
func directories(mounts []mount.Mount) (upper string, lowers []string, err error) {
	if len(mounts) != 1 {
		return "", nil, kind(errdefs.ErrInternal, "snapshot has %d mounts, want 1", len(mounts))
	}
	m := mounts[0]
	if m.Type == "bind" {
		return m.Source, nil, nil
	}
	for _, o := range m.Options {
		if v, ok := strings.CutPrefix(o, "upperdir="); ok {
			upper = v
		}
		if v, ok := strings.CutPrefix(o, "lowerdir="); ok {
			lowers = strings.Split(v, ":")
		}
	}
	if m.Type != "overlay" || upper == "" {
		return "", nil, kind(errdefs.ErrInternal, "snapshot is a %s mount", m.Type)
	}
	return upper, lowers, nil
}

// checkDisk stops unpacking before the disk is full: the databases beside it need room too.
func (s *store) checkDisk() error {
	var st unix.Statfs_t
	if err := unix.Statfs(s.root, &st); err != nil {
		return err
	}
	total, free := int64(st.Blocks)*st.Bsize, int64(st.Bavail)*st.Bsize
	if free < min(maxReserve, total/50) || (st.Files > 0 && st.Ffree < 64) {
		return fmt.Errorf("%d MiB free: %w", free>>20, unix.ENOSPC)
	}
	return nil
}

func syncFilesystem(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		return fmt.Errorf("sync %s: %w", dir, err)
	}
	return nil
}

type progressReader struct {
	r        io.Reader
	n, total int64
	id       string
	last     time.Time
	report   func(Progress)
}

func (p *progressReader) Read(b []byte) (int, error) {
	n, err := p.r.Read(b)
	p.n += int64(n)
	if now := time.Now(); now.Sub(p.last) >= progressEvery {
		p.last = now
		p.report(Progress{ID: p.id, Action: "Extracting", Current: p.n, Total: p.total})
	}
	return n, err
}
