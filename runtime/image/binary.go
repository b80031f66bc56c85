package image

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"path"
	"sort"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
	specs "github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// File is a file of an image made by FromBinary.
type File struct {
	Path string // absolute; with a final "/" it is a directory
	Mode int64  // permission bits; 0 means 0644, for directories 0755
	Data []byte
}

// Artifact is an image as bytes, ready for a registry or an archive.
type Artifact struct {
	MediaType string // of Manifest
	Manifest  []byte
	Config    []byte
	Layer     []byte // gzip
}

// Digest is the manifest's.
func (a Artifact) Digest() digest.Digest { return digest.FromBytes(a.Manifest) }

// ID is the config's digest, what docker calls the image ID.
func (a Artifact) ID() digest.Digest { return digest.FromBytes(a.Config) }

// Blobs are what the manifest refers to.
func (a Artifact) Blobs() [][]byte { return [][]byte{a.Config, a.Layer} }

// FromBinary makes an image of one layer that holds a static program at binPath, and further files. The same input gives the same
// digests. Entrypoint defaults to the program; os and architecture of the platform must be set.
func FromBinary(binPath string, bin []byte, platform ocispec.Platform, cfg ocispec.ImageConfig, extra ...File) (Artifact, error) {
	if platform.OS == "" || platform.Architecture == "" || !path.IsAbs(binPath) {
		return Artifact{}, kind(errdefs.ErrInvalidArgument, "image from binary %q: need an absolute path and a platform", binPath)
	}
	if cfg.Entrypoint == nil && cfg.Cmd == nil {
		cfg.Entrypoint = []string{binPath}
	}
	raw, err := tarFiles(append([]File{{Path: binPath, Mode: 0o755, Data: bin}}, extra...))
	if err != nil {
		return Artifact{}, fmt.Errorf("image from binary %q: %w", binPath, err)
	}
	var z bytes.Buffer
	zw := gzip.NewWriter(&z) // no name, no time: deterministic
	if _, err := zw.Write(raw); err != nil {
		return Artifact{}, err
	}
	if err := zw.Close(); err != nil {
		return Artifact{}, err
	}
	epoch := time.Unix(0, 0).UTC()
	a := Artifact{MediaType: ocispec.MediaTypeImageManifest, Layer: z.Bytes()}
	a.Config, err = json.Marshal(ocispec.Image{Created: &epoch, Platform: platform, Config: cfg,
		RootFS:  ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{digest.FromBytes(raw)}},
		History: []ocispec.History{{Created: &epoch, CreatedBy: "COPY " + path.Base(binPath) + " " + binPath}}})
	if err != nil {
		return Artifact{}, err
	}
	a.Manifest, err = json.Marshal(ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: a.MediaType,
		Config: descriptor(ocispec.MediaTypeImageConfig, a.Config),
		Layers: []ocispec.Descriptor{descriptor(ocispec.MediaTypeImageLayerGzip, a.Layer)}})
	return a, err
}

// tarFiles writes files and the directories above them, sorted.
func tarFiles(files []File) ([]byte, error) {
	all := map[string]File{}
	for _, f := range files {
		if !path.IsAbs(f.Path) {
			return nil, kind(errdefs.ErrInvalidArgument, "path %q is not absolute", f.Path)
		}
		for d := path.Dir(path.Clean(f.Path)); d != "/"; d = path.Dir(d) {
			if _, ok := all[d+"/"]; !ok {
				all[d+"/"] = File{Mode: 0o755}
			}
		}
		name := path.Clean(f.Path)
		if f.Path[len(f.Path)-1] == '/' {
			name += "/"
		}
		all[name] = f
	}
	names := make([]string, 0, len(all))
	for n := range all {
		names = append(names, n)
	}
	sort.Strings(names)
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	for _, n := range names {
		f := all[n]
		h := &tar.Header{Typeflag: tar.TypeReg, Name: n[1:], Mode: f.Mode, Size: int64(len(f.Data)), ModTime: time.Unix(0, 0), Format: tar.FormatPAX}
		if n[len(n)-1] == '/' {
			h.Typeflag, h.Size = tar.TypeDir, 0
		}
		switch {
		case h.Mode != 0:
		case h.Typeflag == tar.TypeDir:
			h.Mode = 0o755
		default:
			h.Mode = 0o644
		}
		if err := tw.WriteHeader(h); err != nil {
			return nil, err
		}
		if h.Typeflag == tar.TypeReg {
			if _, err := tw.Write(f.Data); err != nil {
				return nil, err
			}
		}
	}
	return b.Bytes(), tw.Close()
}

// WriteArchive writes the image as an OCI archive that Load reads, named ref.
func (a Artifact) WriteArchive(w io.Writer, ref string) error {
	n, err := parseRef(ref)
	if err != nil {
		return err
	}
	m := descriptor(a.MediaType, a.Manifest)
	m.Annotations = map[string]string{images.AnnotationImageName: recordName(n)}
	index, err := json.Marshal(ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex,
		Manifests: []ocispec.Descriptor{m}})
	if err != nil {
		return err
	}
	tw := tar.NewWriter(w)
	write := func(name string, b []byte) error {
		if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(b)), ModTime: time.Unix(0, 0)}); err != nil {
			return err
		}
		_, err := tw.Write(b)
		return err
	}
	if err := write(ocispec.ImageLayoutFile, []byte(`{"imageLayoutVersion":"1.0.0"}`)); err != nil {
		return err
	}
	for _, b := range [][]byte{a.Layer, a.Config, a.Manifest} {
		if err := write("blobs/sha256/"+digest.FromBytes(b).Encoded(), b); err != nil {
			return err
		}
	}
	if err := write(ocispec.ImageIndexFile, index); err != nil {
		return err
	}
	return tw.Close()
}
