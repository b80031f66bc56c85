package image

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"path"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/images/archive"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	specs "github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"skein/runtime/layer"
)

const (
	maxArchiveFiles  = 20_000 // several images with 127 layers and their documents
	maxArchiveImages = 1_000
	maxArchiveName   = 4096 // bytes of a file's name or of where a link leads; both are kept until the end
)

// Load implements Store.
func (s *store) Load(ctx context.Context, r io.Reader) ([]Image, error) {
	ctx, done, err := s.lease(s.scope(ctx))
	if err != nil {
		return nil, fmt.Errorf("load images: %w", err)
	}
	defer done()
	imgs, err := s.load(ctx, r)
	if err != nil {
		return nil, fmt.Errorf("load images: %w", diskError(s.root, err))
	}
	return imgs, nil
}

func (s *store) load(ctx context.Context, r io.Reader) ([]Image, error) {
	in := &importer{s: s, blobs: map[string]ocispec.Descriptor{}, links: map[string]string{}, prefix: "load-" + strconv.FormatInt(time.Now().UnixNano(), 36) + "-"}
	plain, err := layer.Decompress(r)
	if err != nil {
		return nil, err
	}
	defer plain.Close()
	if err := in.read(ctx, tar.NewReader(plain)); err != nil {
		return nil, err
	}
	found, err := in.images(ctx)
	if err != nil {
		return nil, err
	}
	want, wantName, err := parsePlatform("")
	if err != nil {
		return nil, err
	}
	var out []Image
	for _, f := range found {
		d, err := s.choose(ctx, source{host: "archive"}, f.target, want, wantName)
		if err != nil {
			return out, err
		}
		if err := s.assemble(ctx, source{host: "archive"}, d, func(Progress) {}); err != nil {
			return out, err
		}
		s.details.drop()
		if err := s.nameLoaded(ctx, f); err != nil {
			return out, err
		}
		img, err := s.Get(ctx, d.configD.Digest.String())
		if err != nil {
			return out, err
		}
		out = append(out, img)
	}
	return out, nil
}

// nameLoaded gives a loaded image its name, or keeps it without one.
func (s *store) nameLoaded(ctx context.Context, f archived) error {
	if f.name != "" {
		return s.name(ctx, f.name, f.target)
	}
	s.names.Lock()
	defer s.names.Unlock()
	return s.keepDangling(ctx, "", f.target)
}

// archived is one image of an archive; the name is a record's.
type archived struct {
	name   string
	target ocispec.Descriptor
}

// importer reads docker-archive and OCI-archive tars. The archive is hostile: only plain files count, documents are bounded, a blob is
// stored under the digest of its bytes.
type importer struct {
	s        *store
	prefix   string
	blobs    map[string]ocispec.Descriptor // by file name
	links    map[string]string
	index    []byte // index.json
	manifest []byte // manifest.json
}

func (in *importer) read(ctx context.Context, tr *tar.Reader) error {
	for n := 0; ; n++ {
		h, err := tr.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return kind(errdefs.ErrInvalidArgument, "read archive: %v: is it an archive of `docker save`?", err)
		}
		if n >= maxArchiveFiles {
			return kind(errdefs.ErrInvalidArgument, "archive has more than %d files", maxArchiveFiles)
		}
		if len(h.Name) > maxArchiveName || len(h.Linkname) > maxArchiveName {
			return kind(errdefs.ErrInvalidArgument, "%.100q: a name in the archive is longer than %d bytes", h.Name, maxArchiveName)
		}
		if layer.IsSparse(h) {
			return kind(errdefs.ErrInvalidArgument, "%.100q: sparse files are not read: a few bytes could fill the disk", h.Name)
		}
		name := path.Clean(h.Name)
		switch h.Typeflag {
		case tar.TypeSymlink:
			in.links[name] = path.Join(path.Dir(name), h.Linkname)
			continue
		case tar.TypeReg:
		default:
			continue
		}
		if err := in.file(ctx, tr, name, h.Size); err != nil {
			return fmt.Errorf("%.200s: %w", name, err)
		}
	}
}

func (in *importer) file(ctx context.Context, tr *tar.Reader, name string, size int64) (err error) {
	switch name {
	case ocispec.ImageIndexFile:
		in.index, err = readBounded(tr, size)
		return err
	case "manifest.json":
		in.manifest, err = readBounded(tr, size)
		return err
	case ocispec.ImageLayoutFile, "repositories":
		return nil
	}
	if base := path.Base(name); base == "VERSION" || base == "json" {
		return nil // of docker's oldest format; manifest.json says the same
	}
	if err := in.s.checkDisk(); err != nil {
		return err
	}
	var want digest.Digest
	if hex, ok := strings.CutPrefix(name, "blobs/sha256/"); ok {
		if want = digest.NewDigestFromEncoded(digest.SHA256, hex); want.Validate() != nil {
			return kind(errdefs.ErrInvalidArgument, "is no digest")
		}
	}
	dg := digest.Canonical.Digester()
	body := &checkedReader{r: io.TeeReader(tr, dg.Hash()), check: in.s.checkDisk}
	ref := in.prefix + strconv.Itoa(len(in.blobs))
	if err := content.WriteBlob(ctx, in.s.content, ref, body, ocispec.Descriptor{Size: size}); err != nil {
		return err
	}
	if want != "" && dg.Digest() != want {
		return kind(errdefs.ErrDataLoss, "holds %s: the archive is damaged", dg.Digest())
	}
	in.blobs[name] = ocispec.Descriptor{Digest: dg.Digest(), Size: size}
	return nil
}

func readBounded(r io.Reader, size int64) ([]byte, error) {
	if size > maxDocument {
		return nil, kind(errdefs.ErrInvalidArgument, "has %d bytes, %d are allowed", size, maxDocument)
	}
	return io.ReadAll(io.LimitReader(r, maxDocument))
}

// checkedReader watches the disk while a blob is written.
type checkedReader struct {
	r     io.Reader
	n     int64
	check func() error
}

func (c *checkedReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	if c.n += int64(n); c.n >= 64<<20 {
		c.n = 0
		if e := c.check(); e != nil {
			return n, e
		}
	}
	return n, err
}

// images lists what the archive holds, by index.json or else by manifest.json.
func (in *importer) images(ctx context.Context) ([]archived, error) {
	var out []archived
	var err error
	switch {
	case in.index != nil:
		out, err = in.fromIndex()
	case in.manifest != nil:
		out, err = in.fromDocker(ctx)
	default:
		return nil, kind(errdefs.ErrInvalidArgument, "archive has neither index.json nor manifest.json: is it an archive of `docker save`?")
	}
	if err == nil && len(out) > maxArchiveImages {
		err = kind(errdefs.ErrInvalidArgument, "archive has more than %d images", maxArchiveImages)
	}
	return out, err
}

func (in *importer) fromIndex() ([]archived, error) {
	var idx ocispec.Index
	if err := json.Unmarshal(in.index, &idx); err != nil {
		return nil, kind(errdefs.ErrInvalidArgument, "index.json: %v", err)
	}
	var out []archived
	for _, m := range idx.Manifests {
		name := m.Annotations[images.AnnotationImageName]
		if r := m.Annotations[ocispec.AnnotationRefName]; name == "" && strings.ContainsAny(r, ":/") {
			name = r
		}
		a, err := named(name, ocispec.Descriptor{MediaType: m.MediaType, Digest: m.Digest, Size: m.Size})
		if err != nil {
			return nil, err
		}
		out = append(out, a)
	}
	return out, nil
}

// named checks a name from an archive. A digest in it must be the image's own: an archive cannot claim another.
func named(name string, target ocispec.Descriptor) (archived, error) {
	if name == "" {
		return archived{target: target}, nil
	}
	n, err := parseRef(name)
	if err != nil {
		return archived{}, err
	}
	if d, ok := n.(reference.Digested); ok && d.Digest() != target.Digest {
		return archived{}, kind(errdefs.ErrInvalidArgument, "archive names %.300q, but holds %s", name, target.Digest)
	}
	return archived{name: recordName(n), target: target}, nil
}

// fromDocker makes the manifests that docker's older format does not have.
func (in *importer) fromDocker(ctx context.Context) ([]archived, error) {
	var list []struct {
		Config   string
		RepoTags []string
		Layers   []string
	}
	if err := json.Unmarshal(in.manifest, &list); err != nil {
		return nil, kind(errdefs.ErrInvalidArgument, "manifest.json: %v", err)
	}
	var out []archived
	for _, e := range list {
		if len(e.Layers) > maxLayers {
			return nil, kind(errdefs.ErrInvalidArgument, "manifest.json: more than %d layers", maxLayers)
		}
		m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Layers: []ocispec.Descriptor{}}
		var err error
		if m.Config, err = in.blob(e.Config); err != nil {
			return nil, err
		}
		m.Config.MediaType = ocispec.MediaTypeImageConfig
		for _, l := range e.Layers {
			d, err := in.blob(l)
			if err != nil {
				return nil, err
			}
			if d.MediaType, err = in.s.layerType(ctx, d); err != nil {
				return nil, err
			}
			m.Layers = append(m.Layers, d)
		}
		b, err := json.Marshal(m)
		if err != nil {
			return nil, err
		}
		target := descriptor(m.MediaType, b)
		if err := content.WriteBlob(ctx, in.s.content, in.prefix+target.Digest.String(), bytes.NewReader(b), target); err != nil {
			return nil, err
		}
		if len(e.RepoTags) == 0 {
			out = append(out, archived{target: target})
		}
		for _, t := range e.RepoTags {
			a, err := named(t, target)
			if err != nil {
				return nil, err
			}
			out = append(out, a)
		}
	}
	return out, nil
}

func (in *importer) blob(name string) (ocispec.Descriptor, error) {
	name = path.Clean(name)
	d, ok := in.blobs[name]
	if !ok {
		d, ok = in.blobs[in.links[name]]
	}
	if !ok {
		return d, kind(errdefs.ErrInvalidArgument, "archive lacks %.200q", name)
	}
	return d, nil
}

// layerType tells a stored layer's compression by its first bytes.
func (s *store) layerType(ctx context.Context, d ocispec.Descriptor) (string, error) {
	ra, err := s.content.ReaderAt(ctx, d)
	if err != nil {
		return "", err
	}
	defer ra.Close()
	head := make([]byte, 4)
	n, err := ra.ReadAt(head, 0)
	if err != nil && err != io.EOF {
		return "", err
	}
	return layer.MediaType(head[:n]), nil
}

// Save implements Store. Of an image for several platforms, the one that is here is written.
func (s *store) Save(ctx context.Context, w io.Writer, refs []string) error {
	ctx, done, err := s.lease(s.scope(ctx))
	if err != nil {
		return fmt.Errorf("save images: %w", err)
	}
	defer done()
	opts := []archive.ExportOpt{archive.WithSkipMissing(s.content)}
	for _, ref := range refs {
		e, record, err := s.find(ctx, ref)
		if err != nil {
			return wrap("save", ref, err)
		}
		if len(opts) == 1 {
			opts = append(opts, archive.WithPlatform(platforms.OnlyStrict(platforms.Normalize(e.img.Config.Platform))))
		}
		var names []string
		if _, tag, _ := splitRecord(record); tag != "" {
			names = []string{record}
		}
		opts = append(opts, archive.WithManifest(e.img.Target, names...))
	}
	if len(refs) == 0 {
		return kind(errdefs.ErrInvalidArgument, "save images: none named")
	}
	if err := archive.Export(ctx, s.content, w, opts...); err != nil {
		return fmt.Errorf("save images: %w", err)
	}
	return nil
}
