package image_test

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	specs "github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"skein/runtime/image"
	"skein/runtime/image/registry"
)

var amd64 = ocispec.Platform{OS: "linux", Architecture: "amd64"}

// newRegistry serves an empty registry over loopback and tells its host:port.
func newRegistry(t *testing.T) (*registry.Registry, string) {
	t.Helper()
	r, err := registry.New(registry.Config{})
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(r)
	t.Cleanup(srv.Close)
	return r, strings.TrimPrefix(srv.URL, "http://")
}

func openStore(t *testing.T, root string) image.Store {
	t.Helper()
	s, err := image.Open(image.Config{Root: root})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func newStore(t *testing.T) (image.Store, string) {
	t.Helper()
	root := filepath.Join(t.TempDir(), "images")
	return openStore(t, root), root
}

func testContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// f is a regular file for tarOf.
func f(name, data string) *tar.Header {
	return &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(data)), Linkname: data}
}

func dir(name string, mode int64) *tar.Header {
	return &tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: mode}
}

func link(typ byte, name, target string) *tar.Header {
	return &tar.Header{Typeflag: typ, Name: name, Linkname: target, Mode: 0o777}
}

// tarOf makes an archive; the Linkname of a regular file is its content.
func tarOf(t testing.TB, hs ...*tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range hs {
		h := *h
		data := ""
		if h.Typeflag == tar.TypeReg {
			data, h.Linkname = h.Linkname, ""
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(data)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func compress(t testing.TB, kind string, b []byte) ([]byte, string) {
	t.Helper()
	var out bytes.Buffer
	switch kind {
	case "gzip":
		w := gzip.NewWriter(&out)
		w.Write(b)
		w.Close()
		return out.Bytes(), ocispec.MediaTypeImageLayerGzip
	case "zstd":
		w, err := zstd.NewWriter(&out)
		if err != nil {
			t.Fatal(err)
		}
		w.Write(b)
		w.Close()
		return out.Bytes(), ocispec.MediaTypeImageLayerZstd
	}
	return b, ocispec.MediaTypeImageLayer
}

// built is an image of several layers, ready to push or to spoil.
type built struct {
	manifest ocispec.Manifest
	config   ocispec.Image
	blobs    [][]byte // config first
}

func build(t testing.TB, kinds string, layers ...[]byte) *built {
	t.Helper()
	b := &built{config: ocispec.Image{Platform: amd64, Config: ocispec.ImageConfig{Cmd: []string{"/bin/sh"}, Labels: map[string]string{"a": "b"}}}}
	b.config.RootFS.Type = "layers"
	b.manifest = ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Layers: []ocispec.Descriptor{}}
	names := strings.Fields(kinds)
	for i, l := range layers {
		z, mediaType := compress(t, names[i%len(names)], l)
		b.config.RootFS.DiffIDs = append(b.config.RootFS.DiffIDs, digest.FromBytes(l))
		b.manifest.Layers = append(b.manifest.Layers, ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(z), Size: int64(len(z))})
		b.blobs = append(b.blobs, z)
	}
	cfg := marshal(t, b.config)
	b.manifest.Config = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: digest.FromBytes(cfg), Size: int64(len(cfg))}
	b.blobs = append([][]byte{cfg}, b.blobs...)
	return b
}

func marshal(t testing.TB, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func (b *built) push(t testing.TB, r *registry.Registry, ref string) digest.Digest {
	t.Helper()
	d, err := r.Put(ref, b.manifest.MediaType, marshal(t, b.manifest), b.blobs...)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// blobFiles counts the content store's files.
func blobFiles(t *testing.T, root string) int {
	t.Helper()
	es, err := os.ReadDir(filepath.Join(root, "content", "blobs", "sha256"))
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	return len(es)
}

// layerDirs counts the directories of layers and containers.
func layerDirs(t *testing.T, root string) int {
	t.Helper()
	es, err := os.ReadDir(filepath.Join(root, "o", "snapshots"))
	if err != nil {
		t.Fatal(err)
	}
	return len(es)
}
