package image

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// FuzzDocuments: a manifest, an index or a config is refused with a kind or taken, and what is taken is within the bounds.
func FuzzDocuments(f *testing.F) {
	d := "sha256:" + strings.Repeat("1", 64)
	types := []string{ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageIndex, "application/vnd.docker.distribution.manifest.v2+json", "application/vnd.docker.distribution.manifest.list.v2+json", "x"}
	f.Add(0, []byte(`{"schemaVersion":2,"config":{"digest":"`+d+`","size":2},"layers":[{"digest":"`+d+`","size":1}]}`), []byte(`{"os":"linux","architecture":"amd64","rootfs":{"diff_ids":["`+d+`"]},"config":{"Env":["A=1"],"Healthcheck":{"Test":["CMD"],"Interval":-1}}}`))
	f.Add(1, []byte(`{"manifests":[{"digest":"`+d+`","size":1,"platform":{"os":"linux","architecture":"amd64","variant":"v8"}},{"digest":"","size":-1,"platform":{}}]}`), []byte(`{}`))
	f.Add(2, []byte(`{"config":{},"manifests":[],"layers":null,"fsLayers":[{}]}`), []byte(`{"rootfs":{"diff_ids":["x"]},"config":null}`))
	f.Add(4, []byte(`[]`), []byte(`null`))
	f.Fuzz(func(t *testing.T, typ int, manifest, config []byte) {
		d := ocispec.Descriptor{MediaType: types[uint(typ)%uint(len(types))], Digest: digest.FromBytes(manifest), Size: int64(len(manifest))}
		want, name, err := parsePlatform("")
		if err != nil {
			t.Fatal(err)
		}
		e, err := decodeManifest(d, manifest)
		if err != nil {
			return
		}
		if len(e.Layers) > maxLayers || len(e.Manifests) > maxManifests || e.Config != nil && e.Manifests != nil {
			t.Fatalf("taken: %+v", e)
		}
		if e.Config == nil {
			_, _ = pick(e.Manifests, want, name)
			return
		}
		out := &details{manifest: d, configD: *e.Config, layers: e.Layers}
		if decodeConfig(config, out, want, name) != nil {
			return
		}
		if len(out.chain) != len(e.Layers) || len(out.config.Config.Volumes) > maxConfigVolumes {
			t.Fatalf("taken: %+v", out)
		}
		if _, err := json.Marshal(out.config); err != nil {
			t.Fatal(err)
		}
	})
}

// FuzzReference: a name is refused, or its record leads back to the same name.
func FuzzReference(f *testing.F) {
	for _, s := range []string{"nginx", "127.0.0.1:5000/a/b:v1", "a@sha256:" + strings.Repeat("1", 64), "dangling@sha256:" + strings.Repeat("1", 64), "../x", "A/b", "a:b:c", "[::1]:5000/x"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		_, _ = asID(s)
		n, err := parseRef(s)
		if err != nil {
			return
		}
		record := recordName(n)
		again, err := parseRef(record)
		if err != nil || recordName(again) != record || strings.HasPrefix(record, danglingPrefix) {
			t.Errorf("%q: record %q, again %v: %v", s, record, again, err)
		}
		_ = familiar(record)
		splitRecord(record)
	})
}
