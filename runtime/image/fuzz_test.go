package image_test

import (
	"archive/tar"
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/opencontainers/go-digest"

	"skein/runtime/image"
)

// regular is f, whose name means the fuzzing test here.
func regular(name, data string) *tar.Header { return f(name, data) }

// FuzzLoad: whatever archive is loaded, it is refused or becomes images that can be read, and nothing is made beside the store.
func FuzzLoad(f *testing.F) {
	layer := tarOf(f, link(tar.TypeSymlink, "x", "/etc"), dir("d", 0o755))
	b := build(f, "none", layer)
	manifest := marshal(f, b.manifest)
	blob := func(b []byte) *tar.Header { return regular("blobs/sha256/"+digest.FromBytes(b).Encoded(), string(b)) }
	f.Add(tarOf(f, blob(b.blobs[0]), blob(layer), blob(manifest), regular("index.json", string(marshal(f, map[string]any{"manifests": []any{map[string]any{
		"mediaType": b.manifest.MediaType, "digest": digest.FromBytes(manifest), "size": len(manifest), "annotations": map[string]string{"io.containerd.image.name": "a:b"}}}})))))
	f.Add(tarOf(f, regular("c.json", string(b.blobs[0])), regular("1/layer.tar", string(layer)), link(tar.TypeSymlink, "2/layer.tar", "../1/layer.tar"),
		regular("manifest.json", `[{"Config":"c.json","RepoTags":["x:1"],"Layers":["2/layer.tar"]}]`)))
	f.Fuzz(func(t *testing.T, b []byte) {
		base := t.TempDir()
		s, err := image.Open(image.Config{Root: filepath.Join(base, "images")})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		if imgs, err := s.Load(t.Context(), bytes.NewReader(b)); err == nil {
			for _, i := range imgs {
				if _, err := s.Get(t.Context(), i.ID.String()); err != nil {
					t.Errorf("loaded %s: %v", i.ID, err)
				}
			}
		}
		if es, err := os.ReadDir(base); err != nil || len(es) != 1 {
			t.Errorf("beside the store: %v %v", es, err)
		}
	})
}
