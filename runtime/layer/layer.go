// Package layer turns one image layer (a tar stream from anywhere) into the upper directory of an overlay.
//
// It mounts nothing: a layer is extracted alone into its own directory, whiteouts become overlay's device nodes and attributes, and parents
// that the archive does not mention take their attributes from the layers below. The archive is hostile: every path is walked by
// handle inside the directory, no entry can be written, linked or removed outside of it, and entries, bytes and names are bounded.
// The directory must not be reachable by anybody else while Apply runs. Used by runtime/image.
package layer

import (
	"archive/tar"
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// Bounds of one layer. An archive beyond them is refused as invalid.
const (
	DefaultMaxEntries = 2_000_000 // the largest images known have a few hundred thousand files
	DefaultMaxBytes   = 128 << 30
	maxPath           = 4096
	maxRatio          = 2000     // uncompressed : compressed, checked beyond ratioFloor; gzip cannot exceed 1032
	ratioFloor        = 1 << 30  // small layers may be all zeros
	checkEvery        = 64 << 20 // bytes between two calls of Options.Check
)

// Options of one Apply.
type Options struct {
	// Lowers are the directories of the layers below, topmost first.
	Lowers []string
	// MaxEntries and MaxBytes bound the archive; 0 means the defaults.
	MaxEntries, MaxBytes int64
	// Check, when set, is called every 64 MiB; its error ends the extraction. It is where the caller watches the disk.
	Check func() error
}

// Result tells what was read.
type Result struct {
	DiffID  digest.Digest // of the uncompressed archive
	Bytes   int64         // of the uncompressed archive
	Entries int64
}

// Apply extracts the uncompressed archive r into the directory dst, which should be empty but for what an earlier Apply left there.
func Apply(ctx context.Context, dst string, r io.Reader, o Options) (Result, error) {
	if o.MaxEntries == 0 {
		o.MaxEntries = DefaultMaxEntries
	}
	if o.MaxBytes == 0 {
		o.MaxBytes = DefaultMaxBytes
	}
	root, err := unix.Open(dst, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return Result{}, fmt.Errorf("open layer directory %s: %w", dst, err)
	}
	defer unix.Close(root)
	low, err := openLowers(o.Lowers)
	if err != nil {
		return Result{}, err
	}
	defer low.close()

	digester := digest.Canonical.Digester()
	in := &meter{ctx: ctx, r: io.TeeReader(r, digester.Hash()), max: o.MaxBytes, check: o.Check}
	x := &extractor{root: root, lowers: low, dirs: map[string]int{}, buf: make([]byte, 256<<10), written: &meter{ctx: ctx, max: o.MaxBytes, check: o.Check}}
	defer x.forget("")
	if err := x.adoptRoot(); err != nil {
		return Result{}, err
	}
	n, err := x.all(tar.NewReader(in), o.MaxEntries)
	if err != nil {
		return Result{}, err
	}
	// The digest covers what follows the archive's end too.
	if _, err := io.Copy(io.Discard, in); err != nil {
		return Result{}, err
	}
	return Result{DiffID: digester.Digest(), Bytes: in.n, Entries: n}, nil
}

// IsSparse tells a file that is larger than what is in the archive: a few bytes may claim to be petabytes.
func IsSparse(h *tar.Header) bool {
	for k := range h.PAXRecords {
		if strings.HasPrefix(k, "GNU.sparse.") {
			return true
		}
	}
	return h.Typeflag == tar.TypeGNUSparse
}

// meter bounds and watches a stream.
type meter struct {
	ctx     context.Context
	r       io.Reader
	n, next int64
	max     int64
	check   func() error
}

func (m *meter) Read(p []byte) (int, error) {
	n, err := m.r.Read(p)
	if e := m.add(int64(n)); e != nil {
		return n, e
	}
	return n, err
}

func (m *meter) add(n int64) error {
	m.n += n
	if m.n > m.max {
		return fmt.Errorf("layer has more than %d bytes: %w", m.max, errdefs.ErrInvalidArgument)
	}
	if m.n < m.next {
		return nil
	}
	m.next = m.n + checkEvery
	if err := m.ctx.Err(); err != nil {
		return err
	}
	if m.check != nil {
		return m.check()
	}
	return nil
}
