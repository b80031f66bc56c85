package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	resolveAttempts = 3  // a registry that is down is told soon
	fetchAttempts   = 5  // in a row without a byte
	fetchRounds     = 50 // in all
	firstDelay      = 200 * time.Millisecond
	maxDelay        = 5 * time.Second
	stallAfter      = 60 * time.Second // without a byte
)

// retry calls f until it succeeds, fails for good, or has failed attempts times in a row without progress.
func retry(ctx context.Context, attempts int, f func() (progress bool, err error)) error {
	delay := firstDelay
	for failed, rounds := 0, 1; ; rounds++ {
		progress, err := f()
		if err == nil || ctx.Err() != nil || !temporary(err) {
			return err
		}
		if failed++; progress {
			failed, delay = 1, firstDelay
		}
		if failed >= attempts || rounds >= fetchRounds {
			return err
		}
		t := time.NewTimer(delay/2 + rand.N(delay))
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return err
		}
		delay = min(2*delay, maxDelay)
	}
}

// source is where blobs come from. A nil fetcher means that all are here already, as after Load.
type source struct {
	host    string
	fetcher remotes.Fetcher
}

// connect resolves a reference at its registry.
func (s *store) connect(ctx context.Context, named reference.Named, a *Auth) (source, ocispec.Descriptor, error) {
	src := source{host: reference.Domain(named)}
	r := s.web.resolver(named, a)
	var desc ocispec.Descriptor
	var name string
	err := retry(ctx, resolveAttempts, func() (_ bool, err error) {
		name, desc, err = r.Resolve(ctx, recordName(named))
		return false, err
	})
	if err != nil {
		return src, desc, explain(src.host, err)
	}
	src.fetcher, err = r.Fetcher(ctx, name)
	return src, desc, err
}

// fetch makes sure that a blob is in the content store and claimed by the context's lease.
func (s *store) fetch(ctx context.Context, src source, d ocispec.Descriptor, report func(int64)) error {
	if err := d.Digest.Validate(); err != nil {
		return kind(errdefs.ErrInvalidArgument, "digest %.100q: %v", d.Digest, err)
	}
	if d.Size < 0 {
		return kind(errdefs.ErrInvalidArgument, "blob %s has a negative size", d.Digest)
	}
	// Only the registry that was asked, never an address from a manifest; and bytes only as a blob.
	d.URLs, d.Data = nil, nil
	unlock, err := s.locks.lock(ctx, "blob "+d.Digest.String())
	if err != nil {
		return err
	}
	defer unlock()
	err = retry(ctx, fetchAttempts, func() (bool, error) { return s.fetchOnce(ctx, src, d, report) })
	if err == nil || src.fetcher == nil {
		return err
	}
	return fmt.Errorf("blob %s: %w", d.Digest, explain(src.host, err))
}

func (s *store) fetchOnce(ctx context.Context, src source, d ocispec.Descriptor, report func(int64)) (progress bool, err error) {
	ref := "fetch-" + d.Digest.String()
	w, err := s.content.Writer(ctx, content.WithRef(ref), content.WithDescriptor(d))
	if errdefs.IsAlreadyExists(err) {
		return false, s.sameSize(ctx, d)
	}
	if err != nil {
		return false, err
	}
	defer w.Close()
	if src.fetcher == nil {
		return false, kind(errdefs.ErrNotFound, "blob %s is missing", d.Digest)
	}
	st, err := w.Status()
	if err != nil {
		return false, err
	}
	if st.Offset > d.Size {
		st.Offset = 0
		if err := w.Truncate(0); err != nil {
			return false, err
		}
	}
	if st.Offset < d.Size || d.Size == 0 {
		n, err := s.copyBlob(ctx, src, w, d, st.Offset, report)
		if err != nil {
			return n > 0, err
		}
	}
	if err := w.Commit(ctx, d.Size, d.Digest); err != nil && !errdefs.IsAlreadyExists(err) {
		// What is here is not what was asked for: never resume from it.
		w.Close()
		_ = s.content.Abort(ctx, ref) // the error below counts; the collector takes what stays
		if errdefs.IsFailedPrecondition(err) {
			return false, kind(errdefs.ErrDataLoss, "registry %s served wrong bytes for %s: %v", src.host, d.Digest, err)
		}
		return false, err
	}
	return true, nil
}

func (s *store) sameSize(ctx context.Context, d ocispec.Descriptor) error {
	info, err := s.content.Info(ctx, d.Digest)
	if err != nil {
		return err
	}
	if info.Size != d.Size {
		return kind(errdefs.ErrInvalidArgument, "blob %s has %d bytes, the manifest says %d", d.Digest, info.Size, d.Size)
	}
	return nil
}

// copyBlob appends the rest of a blob to w, and reads at most one byte more than it may have.
func (s *store) copyBlob(ctx context.Context, src source, w content.Writer, d ocispec.Descriptor, offset int64, report func(int64)) (int64, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	rc, err := src.fetcher.Fetch(ctx, d)
	if err != nil {
		return 0, err
	}
	defer rc.Close()
	if offset > 0 {
		seeker, ok := rc.(io.Seeker)
		if !ok {
			return 0, kind(errdefs.ErrNotImplemented, "cannot resume %s", d.Digest)
		}
		if _, err := seeker.Seek(offset, io.SeekStart); err != nil {
			return 0, err
		}
	}
	watch := time.AfterFunc(stallAfter, func() { cancel(errStalled) })
	defer watch.Stop()
	in := io.LimitReader(rc, d.Size-offset+1)
	buf := make([]byte, 256<<10)
	for at := offset; ; {
		n, err := in.Read(buf)
		watch.Reset(stallAfter)
		if at += int64(n); at > d.Size {
			return at - offset, kind(errdefs.ErrDataLoss, "registry %s sends more than the %d bytes of %s", src.host, d.Size, d.Digest)
		}
		if n > 0 {
			if _, e := w.Write(buf[:n]); e != nil {
				return at - offset, e
			}
			if report != nil {
				report(at)
			}
		}
		if err == io.EOF && at < d.Size {
			err = io.ErrUnexpectedEOF
		}
		if err == io.EOF {
			return at - offset, nil
		}
		if err != nil {
			if cause := context.Cause(ctx); errors.Is(cause, errStalled) {
				err = cause
			}
			return at - offset, err
		}
	}
}
