package image

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"sort"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	maxDocument  = 4 << 20 // manifest, index, config
	maxManifests = 1024    // in one index
	maxLayers    = 127     // docker's own bound; overlayfs takes 500
	maxNesting   = 3       // index in index

	// Of one image's config. Each is copied or acted upon for every container (a volume is a directory and a mount), so that without bounds a
	// config of 4 MiB is hours of work. The largest known images have a few hundred of anything.
	maxConfigList    = 4096 // environment, labels, ports, arguments
	maxConfigVolumes = 128
)

// details is everything that an image's immutable documents say.
type details struct {
	manifest ocispec.Descriptor
	layers   []ocispec.Descriptor
	configD  ocispec.Descriptor
	config   ocispec.Image
	docker   dockerspec.DockerOCIImageConfigExt
	chain    []digest.Digest // chain ID of each layer
	size     int64           // unpacked
}

func (d *details) top() string {
	if len(d.chain) == 0 {
		return ""
	}
	return d.chain[len(d.chain)-1].String()
}

func newReader(b []byte) io.Reader { return bytes.NewReader(b) }

func descriptor(mediaType string, b []byte) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
}

// document reads a small blob of the content store.
func (s *store) document(ctx context.Context, d ocispec.Descriptor) ([]byte, error) {
	if d.Size > maxDocument {
		return nil, kind(errdefs.ErrInvalidArgument, "%s %s has %d bytes, %d are allowed", d.MediaType, d.Digest, d.Size, maxDocument)
	}
	d.Data = nil
	return content.ReadBlob(ctx, s.content, d)
}

// parsePlatform reads "os/arch[/variant]"; empty is this machine.
func parsePlatform(p string) (platforms.MatchComparer, string, error) {
	if p == "" {
		spec := platforms.DefaultSpec()
		return platforms.Only(spec), platforms.Format(spec), nil
	}
	spec, err := platforms.Parse(p)
	if err != nil {
		return nil, "", kind(errdefs.ErrInvalidArgument, "platform %q: want OS/ARCH, e.g. linux/amd64", p)
	}
	return platforms.Only(spec), platforms.Format(spec), nil
}

// envelope is what any document may hold; several kinds at once are an attack (CVE-2021-41190).
type envelope struct {
	MediaType     string               `json:"mediaType"`
	SchemaVersion int                  `json:"schemaVersion"`
	Config        *ocispec.Descriptor  `json:"config"`
	Layers        []ocispec.Descriptor `json:"layers"`
	Manifests     []ocispec.Descriptor `json:"manifests"`
	FSLayers      json.RawMessage      `json:"fsLayers"`
}

// checkType refuses what is neither an image nor an index of images, before it is fetched.
func checkType(d ocispec.Descriptor) error {
	switch {
	case images.IsIndexType(d.MediaType), images.IsManifestType(d.MediaType):
		return nil
	case strings.HasPrefix(d.MediaType, "application/vnd.docker.distribution.manifest.v1+"):
		return kind(errdefs.ErrInvalidArgument, "manifest %s is of the old schema 1: push the image again with a current tool", d.Digest)
	}
	return kind(errdefs.ErrInvalidArgument, "manifest %s: media type %.100q is neither an image manifest nor an index", d.Digest, d.MediaType)
}

// decodeManifest checks that a manifest or index is what its descriptor says and nothing else at the same time.
func decodeManifest(d ocispec.Descriptor, b []byte) (envelope, error) {
	bad := func(format string, a ...any) (envelope, error) {
		return envelope{}, kind(errdefs.ErrInvalidArgument, "manifest %s: %s", d.Digest, fmt.Sprintf(format, a...))
	}
	var e envelope
	if err := json.Unmarshal(b, &e); err != nil {
		return bad("%v", err)
	}
	index, manifest := images.IsIndexType(d.MediaType), images.IsManifestType(d.MediaType)
	switch {
	case len(e.FSLayers) > 0:
		return envelope{}, checkType(ocispec.Descriptor{Digest: d.Digest, MediaType: images.MediaTypeDockerSchema1Manifest})
	case !index && !manifest:
		return envelope{}, checkType(d)
	case e.MediaType != "" && e.MediaType != d.MediaType:
		return bad("says it is %q, but was served as %q", e.MediaType, d.MediaType)
	case index && (e.Config != nil || e.Layers != nil):
		return bad("is an index with layers")
	case manifest && (e.Manifests != nil || e.Config == nil):
		return bad("is a manifest with manifests or without config")
	case len(e.Manifests) > maxManifests:
		return bad("has more than %d manifests", maxManifests)
	case len(e.Layers) > maxLayers:
		return bad("has more than %d layers", maxLayers)
	}
	return e, nil
}

// choose fetches documents from d down to the manifest and config for the platform.
func (s *store) choose(ctx context.Context, src source, d ocispec.Descriptor, want platforms.MatchComparer, wantName string) (*details, error) {
	out := &details{}
	for depth := 0; ; depth++ {
		if depth >= maxNesting {
			return nil, kind(errdefs.ErrInvalidArgument, "index %s is nested too deep", d.Digest)
		}
		if err := checkType(d); err != nil {
			return nil, err
		}
		if d.Size > maxDocument {
			return nil, kind(errdefs.ErrInvalidArgument, "manifest %s has %d bytes, %d are allowed", d.Digest, d.Size, maxDocument)
		}
		if err := s.fetch(ctx, src, d, nil); err != nil {
			return nil, err
		}
		b, err := s.document(ctx, d)
		if err != nil {
			return nil, err
		}
		e, err := decodeManifest(d, b)
		if err != nil {
			return nil, err
		}
		if e.Config != nil {
			out.manifest, out.configD, out.layers = d, *e.Config, e.Layers
			break
		}
		child, err := pick(e.Manifests, want, wantName)
		if err != nil {
			return nil, fmt.Errorf("index %s: %w", d.Digest, err)
		}
		if err := s.label(ctx, d.Digest, map[string]string{"containerd.io/gc.ref.content.m.0": child.Digest.String()}); err != nil {
			return nil, err
		}
		d = child
	}
	if out.configD.Size > maxDocument {
		return nil, kind(errdefs.ErrInvalidArgument, "config %s has %d bytes, %d are allowed", out.configD.Digest, out.configD.Size, maxDocument)
	}
	if err := s.fetch(ctx, src, out.configD, nil); err != nil {
		return nil, err
	}
	return out, s.readConfig(ctx, out, want, wantName)
}

// pick is the best manifest of an index for the platform.
func pick(ms []ocispec.Descriptor, want platforms.MatchComparer, wantName string) (ocispec.Descriptor, error) {
	var fit []ocispec.Descriptor
	var have []string
	for _, m := range ms {
		switch {
		case m.Platform == nil && len(ms) == 1:
			return m, nil // the config decides
		case m.Platform == nil || m.Platform.OS == "unknown":
		case want.Match(*m.Platform):
			fit = append(fit, m)
		default:
			have = append(have, platforms.Format(*m.Platform))
		}
	}
	if len(fit) == 0 {
		return ocispec.Descriptor{}, kind(errdefs.ErrNotFound, "image has no variant for %s, only for %s: build or choose one for this platform",
			wantName, orNone(have))
	}
	sort.SliceStable(fit, func(i, j int) bool { return want.Less(*fit[i].Platform, *fit[j].Platform) })
	return fit[0], nil
}

func orNone(l []string) string {
	if len(l) == 0 {
		return "none"
	}
	return strings.Join(l[:min(len(l), 20)], ", ")
}

// readConfig reads the stored config of out.
func (s *store) readConfig(ctx context.Context, out *details, want platforms.MatchComparer, wantName string) error {
	b, err := s.document(ctx, out.configD)
	if err != nil {
		return err
	}
	return decodeConfig(b, out, want, wantName)
}

// decodeConfig checks a config against its manifest and the platform, and fills out with what it says.
func decodeConfig(b []byte, out *details, want platforms.MatchComparer, wantName string) error {
	if err := json.Unmarshal(b, &out.config); err != nil {
		return kind(errdefs.ErrInvalidArgument, "config %s: %v", out.configD.Digest, err)
	}
	var ext struct {
		Config dockerspec.DockerOCIImageConfigExt `json:"config"`
	}
	if err := json.Unmarshal(b, &ext); err != nil {
		return kind(errdefs.ErrInvalidArgument, "config %s: %v", out.configD.Digest, err)
	}
	out.docker = ext.Config
	if err := checkConfig(out); err != nil {
		return err
	}
	c := out.config
	if len(c.RootFS.DiffIDs) != len(out.layers) {
		return kind(errdefs.ErrInvalidArgument, "config %s names %d layers, the manifest %d (an artifact that is no image?)",
			out.configD.Digest, len(c.RootFS.DiffIDs), len(out.layers))
	}
	for _, d := range c.RootFS.DiffIDs {
		if err := d.Validate(); err != nil {
			return kind(errdefs.ErrInvalidArgument, "config %s: layer %.100q: %v", out.configD.Digest, d, err)
		}
	}
	if want != nil && c.OS != "" && c.Architecture != "" && !want.Match(platforms.Normalize(c.Platform)) {
		return kind(errdefs.ErrNotFound, "image is for %s, not for %s", platforms.Format(c.Platform), wantName)
	}
	out.chain = identity.ChainIDs(append([]digest.Digest(nil), c.RootFS.DiffIDs...))
	return nil
}

// checkConfig bounds what every container of the image would have to carry.
func checkConfig(d *details) error {
	c := d.config.Config
	health := 0
	if h := d.docker.Healthcheck; h != nil {
		health = len(h.Test)
	}
	for _, l := range []struct {
		name   string
		n, max int
	}{
		{"Env", len(c.Env), maxConfigList}, {"Labels", len(c.Labels), maxConfigList}, {"ExposedPorts", len(c.ExposedPorts), maxConfigList},
		{"Entrypoint", len(c.Entrypoint), maxConfigList}, {"Cmd", len(c.Cmd), maxConfigList}, {"Shell", len(d.docker.Shell), maxConfigList},
		{"Healthcheck", health, maxConfigList}, {"OnBuild", len(d.docker.OnBuild), maxConfigList}, {"Volumes", len(c.Volumes), maxConfigVolumes},
	} {
		if l.n > l.max {
			return kind(errdefs.ErrInvalidArgument, "config %s: %s has %d entries, %d are allowed", d.configD.Digest, l.name, l.n, l.max)
		}
	}
	return nil
}

// label adds labels to a blob.
func (s *store) label(ctx context.Context, d digest.Digest, labels map[string]string) error {
	info := content.Info{Digest: d, Labels: labels}
	fields := make([]string, 0, len(labels))
	for k := range labels {
		fields = append(fields, "labels."+k)
	}
	_, err := s.content.Update(ctx, info, fields...)
	return err
}

// describe reads, from what is stored, the details of the image below target. It is called often and remembers.
func (s *store) describe(ctx context.Context, target ocispec.Descriptor) (*details, error) {
	s.details.mu.Lock()
	known := s.details.m[target.Digest]
	s.details.mu.Unlock()
	if known != nil {
		return known, nil
	}
	out := &details{}
	for d, depth := target, 0; ; depth++ {
		b, err := s.document(ctx, d)
		if err != nil {
			return nil, err
		}
		e, err := decodeManifest(d, b)
		if err != nil {
			return nil, err
		}
		if e.Config != nil {
			out.manifest, out.configD, out.layers = d, *e.Config, e.Layers
			break
		}
		// The child that was chosen when the image came is the one that is kept.
		info, err := s.content.Info(ctx, d.Digest)
		if err != nil {
			return nil, err
		}
		kept := digest.Digest(info.Labels["containerd.io/gc.ref.content.m.0"])
		i := indexOf(e.Manifests, kept)
		if i < 0 || depth >= maxNesting {
			return nil, kind(errdefs.ErrNotFound, "index %s has no local manifest: pull it again", d.Digest)
		}
		d = e.Manifests[i]
	}
	if err := s.readConfig(ctx, out, nil, ""); err != nil {
		return nil, err
	}
	for _, c := range out.chain {
		u, err := s.snaps.Usage(ctx, c.String())
		if err != nil {
			return nil, err
		}
		out.size += u.Size
	}
	s.details.put(target.Digest, out)
	return out, nil
}

func indexOf(ms []ocispec.Descriptor, d digest.Digest) int {
	for i, m := range ms {
		if m.Digest == d {
			return i
		}
	}
	return -1
}

// maxDetails bounds the cache; beyond it the documents are read again.
const maxDetails = 512

func (c *detailCache) put(target digest.Digest, d *details) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.m == nil || len(c.m) >= maxDetails {
		c.m = map[digest.Digest]*details{}
	}
	c.m[target] = d
}

// drop forgets all: an image was removed, and the same digest may come back with another choice.
func (c *detailCache) drop() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.m = nil
}
