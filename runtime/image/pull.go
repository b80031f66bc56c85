package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	downloads     = 3 // at once for one image, as docker
	progressEvery = 100 * time.Millisecond
)

// Pull implements Store.
func (s *store) Pull(ctx context.Context, ref string, o PullOptions) (Image, error) {
	named, err := parseRef(ref)
	if err != nil {
		return Image{}, wrap("pull", ref, err)
	}
	want, wantName, err := parsePlatform(o.Platform)
	if err != nil {
		return Image{}, wrap("pull", ref, err)
	}
	// A credential is part of the key: nobody gets an image on somebody else's.
	key := recordName(named) + " " + wantName + " " + authKey(o.Auth)
	img, err := s.flights.do(s.scope(ctx), s.ctx, key, o.Progress, func(ctx context.Context, report func(Progress)) (Image, error) {
		start := time.Now()
		img, err := s.pull(ctx, named, want, wantName, o.Auth, report)
		if err == nil {
			s.log.Info("pulled", "image", familiar(recordName(named)), "platform", wantName, "took", time.Since(start).Round(time.Millisecond))
		}
		return img, err
	})
	if err != nil {
		return Image{}, wrap("pull", familiar(named.String()), diskError(s.root, err))
	}
	return img, nil
}

func authKey(a *Auth) string {
	if a == nil {
		return ""
	}
	b, err := json.Marshal(a)
	if err != nil {
		return ""
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

func (s *store) pull(ctx context.Context, named reference.Named, want platforms.MatchComparer, wantName string, a *Auth, report func(Progress)) (Image, error) {
	if s.ctx.Err() != nil {
		return Image{}, errClosed
	}
	ctx, done, err := s.lease(ctx)
	if err != nil {
		return Image{}, err
	}
	defer done()
	src, target, err := s.connect(ctx, named, a)
	if err != nil {
		return Image{}, err
	}
	d, err := s.choose(ctx, src, target, want, wantName)
	if err != nil {
		return Image{}, err
	}
	if err := s.assemble(ctx, src, d, report); err != nil {
		return Image{}, err
	}
	s.details.drop() // the same index may now mean another platform
	if err := s.name(ctx, recordName(named), target); err != nil {
		return Image{}, err
	}
	return s.Get(ctx, recordName(named))
}

// assemble fetches and unpacks the layers of d and links everything, so that whoever keeps the manifest keeps it all.
func (s *store) assemble(ctx context.Context, src source, d *details, report func(Progress)) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	got := make([]chan error, len(d.layers))
	for i := range got {
		got[i] = make(chan error, 1)
		report(Progress{ID: shortID(d.layers[i].Digest), Action: "Pulling fs layer"})
	}
	turns := make(chan struct{}, downloads)
	running := make(chan struct{})
	go func() { // ends before assemble does
		defer close(running)
		for i, l := range d.layers {
			turns <- struct{}{}
			go func() {
				got[i] <- s.fetchLayer(ctx, src, l, report)
				<-turns
			}()
		}
		for range cap(turns) {
			turns <- struct{}{}
		}
	}()
	defer func() { <-running }()
	fresh := false
	for i := range d.layers {
		if err := <-got[i]; err != nil {
			cancel(err)
			return err
		}
		made, err := s.unpack(ctx, d, i, report)
		if err != nil {
			err = fmt.Errorf("layer %s: %w", d.layers[i].Digest, err)
			cancel(err)
			return err
		}
		fresh = fresh || made
	}
	if fresh {
		if err := syncFilesystem(s.root); err != nil {
			return err
		}
	}
	return s.link(ctx, d)
}

// link lets the manifest keep config and layers, and the config the unpacked top layer, which keeps those below.
func (s *store) link(ctx context.Context, d *details) error {
	refs := map[string]string{"containerd.io/gc.ref.content.config": d.configD.Digest.String()}
	for i, l := range d.layers {
		refs[fmt.Sprintf("containerd.io/gc.ref.content.l.%d", i)] = l.Digest.String()
	}
	if err := s.label(ctx, d.manifest.Digest, refs); err != nil {
		return err
	}
	if len(d.chain) == 0 {
		return nil
	}
	return s.label(ctx, d.configD.Digest, map[string]string{"containerd.io/gc.ref.snapshot." + snapshotter: d.top()})
}

func (s *store) fetchLayer(ctx context.Context, src source, l ocispec.Descriptor, report func(Progress)) error {
	id, last, started := shortID(l.Digest), time.Time{}, false
	err := s.fetch(ctx, src, l, func(n int64) {
		if now := time.Now(); now.Sub(last) >= progressEvery || n == l.Size {
			last, started = now, true
			report(Progress{ID: id, Action: "Downloading", Current: n, Total: l.Size})
		}
	})
	if err == nil && started {
		report(Progress{ID: id, Action: "Download complete"})
	}
	return err
}

// name points a record at target. The image that had the name before stays, without it, until somebody removes it.
func (s *store) name(ctx context.Context, name string, target ocispec.Descriptor) error {
	s.names.Lock()
	defer s.names.Unlock()
	return s.setName(ctx, name, target)
}

// setName is name for those who hold names.
func (s *store) setName(ctx context.Context, name string, target ocispec.Descriptor) error {
	target = ocispec.Descriptor{MediaType: target.MediaType, Digest: target.Digest, Size: target.Size}
	old, err := s.images.Get(ctx, name)
	if errdefs.IsNotFound(err) {
		if _, err := s.images.Create(ctx, images.Image{Name: name, Target: target}); err != nil {
			return err
		}
		return s.dropDangling(ctx, target.Digest)
	}
	if err != nil || old.Target.Digest == target.Digest {
		return err
	}
	if err := s.keepDangling(ctx, name, old.Target); err != nil {
		return err
	}
	old.Target = target
	if _, err := s.images.Update(ctx, old, "target"); err != nil {
		return err
	}
	return s.dropDangling(ctx, target.Digest)
}

// keepDangling gives an image that is about to lose its last name a record without one.
func (s *store) keepDangling(ctx context.Context, losing string, target ocispec.Descriptor) error {
	all, err := s.images.List(ctx)
	if err != nil {
		return err
	}
	for _, i := range all {
		if i.Target.Digest == target.Digest && i.Name != losing {
			return nil
		}
	}
	return s.createDangling(ctx, target)
}

func (s *store) createDangling(ctx context.Context, target ocispec.Descriptor) error {
	_, err := s.images.Create(ctx, images.Image{Name: danglingPrefix + target.Digest.String(), Target: target})
	if errdefs.IsAlreadyExists(err) {
		return nil
	}
	return err
}

func (s *store) dropDangling(ctx context.Context, d digest.Digest) error {
	if err := s.images.Delete(ctx, danglingPrefix+d.String()); err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	return nil
}

// Resolve implements Store.
func (s *store) Resolve(ctx context.Context, ref string, a *Auth) (ocispec.Descriptor, []ocispec.Platform, error) {
	named, err := parseRef(ref)
	if err != nil {
		return ocispec.Descriptor{}, nil, wrap("resolve", ref, err)
	}
	d, ps, err := s.askRegistry(s.scope(ctx), named, a)
	if err != nil {
		return ocispec.Descriptor{}, nil, wrap("resolve", familiar(named.String()), err)
	}
	return d, ps, nil
}

func (s *store) askRegistry(ctx context.Context, named reference.Named, a *Auth) (ocispec.Descriptor, []ocispec.Platform, error) {
	src, d, err := s.connect(ctx, named, a)
	if err != nil {
		return d, nil, err
	}
	if err := checkType(d); err != nil {
		return d, nil, err
	}
	b, err := fetchDocument(ctx, src, d)
	if err != nil {
		return d, nil, err
	}
	e, err := decodeManifest(d, b)
	if err != nil {
		return d, nil, err
	}
	var ps []ocispec.Platform
	if e.Config == nil {
		for _, m := range e.Manifests {
			if m.Platform != nil && m.Platform.OS != "unknown" {
				ps = append(ps, platforms.Normalize(*m.Platform))
			}
		}
		return d, ps, nil
	}
	b, err = fetchDocument(ctx, src, *e.Config)
	if err != nil {
		return d, nil, err
	}
	var c ocispec.Image
	if err := json.Unmarshal(b, &c); err != nil {
		return d, nil, kind(errdefs.ErrInvalidArgument, "config %s: %v", e.Config.Digest, err)
	}
	if c.OS != "" && c.Architecture != "" {
		ps = append(ps, platforms.Normalize(c.Platform))
	}
	return d, ps, nil
}

// fetchDocument reads a verified document into memory, past the store.
func fetchDocument(ctx context.Context, src source, d ocispec.Descriptor) (b []byte, err error) {
	if d.Size > maxDocument || d.Size < 0 {
		return nil, kind(errdefs.ErrInvalidArgument, "document %s has %d bytes, %d are allowed", d.Digest, d.Size, maxDocument)
	}
	if err := d.Digest.Validate(); err != nil {
		return nil, kind(errdefs.ErrInvalidArgument, "digest %.100q: %v", d.Digest, err)
	}
	d.URLs, d.Data = nil, nil
	err = retry(ctx, resolveAttempts, func() (bool, error) {
		rc, err := src.fetcher.Fetch(ctx, d)
		if err != nil {
			return false, err
		}
		defer rc.Close()
		b, err = io.ReadAll(io.LimitReader(rc, d.Size+1))
		if err == nil && int64(len(b)) < d.Size {
			err = io.ErrUnexpectedEOF
		}
		return false, err
	})
	if err != nil {
		return nil, fmt.Errorf("document %s: %w", d.Digest, explain(src.host, err))
	}
	if d.Digest.Algorithm().FromBytes(b) != d.Digest {
		return nil, kind(errdefs.ErrDataLoss, "registry %s served wrong bytes for %s", src.host, d.Digest)
	}
	return b, nil
}
