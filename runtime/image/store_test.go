package image_test

import (
	"bytes"
	"os"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"skein/runtime/image"
)

func TestRemoveFreesContent(t *testing.T) {
	reg, host := newRegistry(t)
	threeLayers(t, "gzip").push(t, reg, "web:v1")
	build(t, "gzip", tarOf(t, dir("etc/", 0o750), f("etc/keep", "keep"), f("etc/gone", "gone"), dir("opq/", 0o755), f("opq/old", "old"), f("first", "1"),
		link('1', "second", "first"), link('2', "sym", "/etc/keep")), tarOf(t, f("other", "o"))).push(t, reg, "web:other") // shares the first layer
	s, root := newStore(t)
	ctx := testContext(t)
	img, err := s.Pull(ctx, host+"/web:v1", image.PullOptions{})
	if err != nil {
		t.Fatal(err)
	}
	blobs, dirs := blobFiles(t, root), layerDirs(t, root)
	if blobs != 5 || dirs != 3 {
		t.Errorf("one image: got %d blobs, %d directories, want 5 and 3", blobs, dirs)
	}
	if _, err := s.Pull(ctx, host+"/web:other", image.PullOptions{}); err != nil {
		t.Fatal(err)
	}
	if b, d := blobFiles(t, root), layerDirs(t, root); b != 8 || d != 4 {
		t.Errorf("two images: got %d blobs, %d directories, want 8 and 4", b, d)
	}
	un, del, err := s.Remove(ctx, host+"/web:other", false)
	if err != nil || !slices.Equal(un, []string{host + "/web:other"}) || len(del) != 2 {
		t.Errorf("Remove: %v, %v, %v", un, del, err)
	}
	if b, d := blobFiles(t, root), layerDirs(t, root); b != blobs || d != dirs {
		t.Errorf("after removal: got %d blobs, %d directories, want %d and %d", b, d, blobs, dirs)
	}
	if err := s.Tag(ctx, img.ID.Encoded()[:8], "other/name:x"); err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.Remove(ctx, img.ID.String(), false); !errdefs.IsConflict(err) {
		t.Errorf("remove by ID with two repositories: got %v, want a conflict", err)
	}
	if un, del, err := s.Remove(ctx, "other/name:x", false); err != nil || len(un) != 1 || len(del) != 0 {
		t.Errorf("untag: %v, %v, %v", un, del, err)
	}
	if _, del, err := s.Remove(ctx, img.ID.String(), false); err != nil || len(del) != 4 {
		t.Errorf("remove by ID: %v, %v", del, err)
	}
	if b, d := blobFiles(t, root), layerDirs(t, root); b != 0 || d != 0 {
		t.Errorf("at the end: got %d blobs, %d directories, want none", b, d)
	}
	if _, err := s.Get(ctx, host+"/web:v1"); !errdefs.IsNotFound(err) {
		t.Errorf("Get: got %v, want not found", err)
	}
}

func TestInUse(t *testing.T) {
	reg, host := newRegistry(t)
	threeLayers(t, "gzip").push(t, reg, "web:v1")
	s, root := newStore(t)
	ctx := testContext(t)
	img, err := s.Pull(ctx, host+"/web:v1", image.PullOptions{})
	if err != nil {
		t.Fatal(err)
	}
	ms, err := s.Prepare(ctx, "c1", img)
	if err != nil {
		t.Fatal(err)
	}
	_, _, err = s.Remove(ctx, host+"/web:v1", false)
	if !errdefs.IsConflict(err) || !strings.Contains(err.Error(), "image is being used by c1") {
		t.Errorf("got %v, want a conflict that names c1", err)
	}
	un, del, err := s.Remove(ctx, host+"/web:v1", true)
	if err != nil || len(un) != 1 || len(del) != 0 {
		t.Errorf("force: %v, %v, %v", un, del, err)
	}
	if got, err := s.Get(ctx, img.ID.String()); err != nil || len(got.Tags) != 0 {
		t.Errorf("after force: %+v, %v", got, err)
	}
	checkTree(t, ms[0], map[string]string{"etc/late": "late"})
	if keys, err := s.Snapshots(ctx); err != nil || !slices.Equal(keys, []string{"c1"}) {
		t.Errorf("Snapshots: %v, %v", keys, err)
	}
	for range 2 {
		if err := s.RemoveSnapshot(ctx, "c1"); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.Mounts(ctx, "c1"); !errdefs.IsNotFound(err) {
		t.Errorf("Mounts: got %v, want not found", err)
	}
	if _, _, err := s.Remove(ctx, img.ID.String(), false); err != nil {
		t.Fatal(err)
	}
	if b, d := blobFiles(t, root), layerDirs(t, root); b != 0 || d != 0 {
		t.Errorf("at the end: got %d blobs, %d directories, want none", b, d)
	}
	if _, err := s.Prepare(ctx, "c2", img); !errdefs.IsNotFound(err) {
		t.Errorf("Prepare of a removed image: got %v, want not found", err)
	}
}

func TestTagMoves(t *testing.T) {
	reg, host := newRegistry(t)
	s, _ := newStore(t)
	ctx := testContext(t)
	var ids []digest.Digest
	for _, v := range []string{"one", "two"} {
		build(t, "gzip", tarOf(t, f("v", v))).push(t, reg, "web:latest")
		img, err := s.Pull(ctx, host+"/web", image.PullOptions{})
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, img.ID)
	}
	if img, err := s.Get(ctx, host+"/web"); err != nil || img.ID != ids[1] {
		t.Errorf("got %v, %v, want the second", img.ID, err)
	}
	old, err := s.Get(ctx, ids[0].String())
	if err != nil || len(old.Tags) != 0 {
		t.Errorf("the first: %+v, %v, want it without tag", old, err)
	}
	l, err := s.List(ctx)
	if err != nil || len(l) != 2 {
		t.Errorf("List: %d, %v", len(l), err)
	}
	if err := s.Tag(ctx, ids[0].String(), "nginx"); err != nil {
		t.Fatal(err)
	}
	if img, err := s.Get(ctx, "docker.io/library/nginx:latest"); err != nil || img.Tags[0] != "nginx:latest" {
		t.Errorf("familiar name: %+v, %v", img.Tags, err)
	}
	for _, bad := range []string{"UPPER", "a b", "x@" + ids[0].String()} {
		if err := s.Tag(ctx, ids[0].String(), bad); !errdefs.IsInvalidArgument(err) {
			t.Errorf("Tag(%q): got %v, want invalid", bad, err)
		}
	}
}

func TestIndex(t *testing.T) {
	reg, host := newRegistry(t)
	var idx ocispec.Index
	idx.SchemaVersion, idx.MediaType = 2, ocispec.MediaTypeImageIndex
	for _, arch := range []string{"arm64", "amd64"} {
		b := build(t, "gzip", tarOf(t, f("arch", arch)))
		b.config.Architecture = arch
		cfg := marshal(t, b.config)
		b.blobs[0] = cfg
		b.manifest.Config.Digest, b.manifest.Config.Size = digest.FromBytes(cfg), int64(len(cfg))
		d := b.push(t, reg, "web:"+arch)
		idx.Manifests = append(idx.Manifests, ocispec.Descriptor{MediaType: b.manifest.MediaType, Digest: d, Size: int64(len(marshal(t, b.manifest))),
			Platform: &ocispec.Platform{OS: "linux", Architecture: arch}})
	}
	d, err := reg.Put("web:multi", idx.MediaType, marshal(t, idx))
	if err != nil {
		t.Fatal(err)
	}
	s, _ := newStore(t)
	ctx := testContext(t)
	got, ps, err := s.Resolve(ctx, host+"/web:multi", nil)
	if err != nil || got.Digest != d || len(ps) != 2 || ps[0].Architecture != "arm64" {
		t.Errorf("Resolve: %v, %v, %v", got, ps, err)
	}
	img, err := s.Pull(ctx, host+"/web:multi@"+d.String(), image.PullOptions{Platform: "linux/amd64"})
	if err != nil {
		t.Fatal(err)
	}
	if img.Config.Architecture != "amd64" || img.Target.Digest != d || !slices.Equal(img.Digests, []string{host + "/web@" + d.String()}) || len(img.Tags) != 0 {
		t.Errorf("got %+v", img)
	}
	_, err = s.Pull(ctx, host+"/web:multi", image.PullOptions{Platform: "linux/s390x"})
	if !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "no variant for linux/s390x, only for linux/arm64, linux/amd64") {
		t.Errorf("got %v, want the platforms", err)
	}
	_, err = s.Pull(ctx, host+"/web:arm64", image.PullOptions{Platform: "linux/amd64"})
	if !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "image is for linux/arm64") {
		t.Errorf("got %v, want the platform", err)
	}
}

func TestSaveLoad(t *testing.T) {
	reg, host := newRegistry(t)
	threeLayers(t, "gzip zstd none").push(t, reg, "web:v1")
	s, _ := newStore(t)
	ctx := testContext(t)
	img, err := s.Pull(ctx, host+"/web:v1", image.PullOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var oci bytes.Buffer
	if err := s.Save(ctx, &oci, []string{host + "/web:v1"}); err != nil {
		t.Fatal(err)
	}
	raw := threeLayers(t, "none")
	docker := tarOf(t, f("abc.json", string(marshal(t, raw.config))), f("l1/layer.tar", string(raw.blobs[1])), f("l2/layer.tar", string(raw.blobs[2])),
		f("l3/layer.tar", string(raw.blobs[3])), f("l1/VERSION", "1.0"), link('2', "l4/layer.tar", "../l3/layer.tar"),
		f("manifest.json", `[{"Config":"abc.json","RepoTags":["web:v1"],"Layers":["l1/layer.tar","l2/layer.tar","l4/layer.tar"]}]`))
	for name, b := range map[string][]byte{"oci": oci.Bytes(), "docker": docker} {
		other, root := newStore(t)
		got, err := other.Load(ctx, bytes.NewReader(b))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if len(got) != 1 || len(got[0].Tags) != 1 || !strings.HasSuffix(got[0].Tags[0], "web:v1") || len(got[0].Config.RootFS.DiffIDs) != 3 {
			t.Errorf("%s: got %+v", name, got)
		}
		if name == "oci" && (got[0].ID != img.ID || got[0].Target.Digest != img.Target.Digest) {
			t.Errorf("round trip: got %s, want %s", got[0].ID, img.ID)
		}
		ms, err := other.Prepare(ctx, "c", got[0])
		if err != nil {
			t.Fatal(err)
		}
		checkTree(t, ms[0], map[string]string{"etc/late": "late", "etc/gone": "-"})
		if _, err := other.Load(ctx, bytes.NewReader(b)); err != nil {
			t.Errorf("%s again: %v", name, err)
		}
		blobs := blobFiles(t, root)
		if _, err := other.Load(ctx, bytes.NewReader(b[:len(b)/2])); err == nil {
			t.Errorf("%s: half an archive is no error", name)
		}
		if err := other.Close(); err != nil {
			t.Fatal(err)
		}
		again := openStore(t, root)
		if l, err := again.List(ctx); err != nil || len(l) != 1 || blobFiles(t, root) != blobs {
			t.Errorf("%s: reopened: %d images, %d blobs, want 1 and %d: %v", name, len(l), blobFiles(t, root), blobs, err)
		}
	}
}

func TestHostileArchives(t *testing.T) {
	s, root := newStore(t)
	ctx := testContext(t)
	b := build(t, "none", tarOf(t, f("x", "1")))
	cfg := string(b.blobs[0])
	for name, a := range map[string][]byte{
		"no tar":             []byte("what is this"),
		"empty":              tarOf(t),
		"damaged blob":       tarOf(t, f("blobs/sha256/"+strings.Repeat("0", 64), "x"), f("index.json", "{}")),
		"blob outside":       tarOf(t, f("manifest.json", `[{"Config":"../../../etc/passwd","Layers":[]}]`)),
		"missing layer":      tarOf(t, f("c.json", cfg), f("manifest.json", `[{"Config":"c.json","Layers":["nope"]}]`)),
		"wrong layer":        tarOf(t, f("c.json", cfg), f("l", string(tarOf(t, f("x", "2")))), f("manifest.json", `[{"Config":"c.json","Layers":["l"]}]`)),
		"index of nothing":   tarOf(t, f("index.json", `{"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:`+strings.Repeat("1", 64)+`","size":3}]}`)),
		"digest in the name": tarOf(t, f("c.json", cfg), f("l", string(b.blobs[1])), f("manifest.json", `[{"Config":"c.json","RepoTags":["a@sha256:`+strings.Repeat("1", 64)+`"],"Layers":["l"]}]`)),
		"bad name":           tarOf(t, f("c.json", cfg), f("l", string(b.blobs[1])), f("manifest.json", `[{"Config":"c.json","RepoTags":["../../X"],"Layers":["l"]}]`)),
		"not JSON":           tarOf(t, f("manifest.json", `[{`)),
	} {
		if got, err := s.Load(ctx, bytes.NewReader(a)); err == nil {
			t.Errorf("%s: got %v, want an error", name, got)
		} else if errdefs.IsInternal(err) || errdefs.IsUnknown(err) {
			t.Errorf("%s: %v has no kind", name, err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	openStore(t, root)
	if n := blobFiles(t, root); n != 0 {
		t.Errorf("%d blobs are left", n)
	}
}

func TestFromBinary(t *testing.T) {
	cfg := ocispec.ImageConfig{Env: []string{"A=b"}}
	a, err := image.FromBinary("/bin/app", []byte("program"), amd64, cfg, image.File{Path: "/etc/motd", Data: []byte("hi")}, image.File{Path: "/tmp/", Mode: 0o777})
	if err != nil {
		t.Fatal(err)
	}
	again, err := image.FromBinary("/bin/app", []byte("program"), amd64, cfg, image.File{Path: "/etc/motd", Data: []byte("hi")}, image.File{Path: "/tmp/", Mode: 0o777})
	if err != nil || a.Digest() != again.Digest() {
		t.Errorf("digests differ: %s, %s, %v", a.Digest(), again.Digest(), err)
	}
	s, _ := newStore(t)
	ctx := testContext(t)
	var b bytes.Buffer
	if err := a.WriteArchive(&b, "demo/app:v1"); err != nil {
		t.Fatal(err)
	}
	loaded, err := s.Load(ctx, &b)
	if err != nil || loaded[0].ID != a.ID() || loaded[0].Tags[0] != "demo/app:v1" {
		t.Fatalf("Load: %+v, %v", loaded, err)
	}
	reg, host := newRegistry(t)
	if _, err := reg.Put("app:v1", a.MediaType, a.Manifest, a.Blobs()...); err != nil {
		t.Fatal(err)
	}
	img, err := s.Pull(ctx, host+"/app:v1", image.PullOptions{})
	if err != nil || img.ID != a.ID() || len(img.Tags) != 2 {
		t.Fatalf("Pull: %+v, %v", img, err)
	}
	ms, err := s.Prepare(ctx, "c", img)
	if err != nil {
		t.Fatal(err)
	}
	checkTree(t, ms[0], map[string]string{"bin/app": "program", "etc/motd": "hi", "tmp": "mode 0777", "bin": "mode 0755"})
}

func TestNoLayers(t *testing.T) {
	reg, host := newRegistry(t)
	build(t, "gzip").push(t, reg, "scratch:v1")
	s, _ := newStore(t)
	ctx := testContext(t)
	img, err := s.Pull(ctx, host+"/scratch:v1", image.PullOptions{})
	if err != nil {
		t.Fatal(err)
	}
	ms, err := s.Prepare(ctx, "c", img)
	if err != nil || ms[0].Type != "bind" {
		t.Fatalf("got %+v, %v, want a bind mount", ms, err)
	}
	checkTree(t, ms[0], map[string]string{"x": "-"})
}

func TestOpenTwice(t *testing.T) {
	t.Parallel()
	_, root := newStore(t)
	_, err := image.Open(image.Config{Root: root})
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), root) {
		t.Errorf("got %v, want that another process has it", err)
	}
	if _, err := image.Open(image.Config{Root: "relative"}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("relative root: got %v", err)
	}
	if _, err := image.Open(image.Config{Root: filepath.Join(t.TempDir(), "x"), Insecure: []string{"http://x"}}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("insecure URL: got %v", err)
	}
}

// TestCloseEndsEverything: no goroutine and no descriptor outlives the store.
func TestCloseEndsEverything(t *testing.T) {
	reg, host := newRegistry(t)
	threeLayers(t, "gzip").push(t, reg, "web:v1")
	fds := func() int {
		es, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(es)
	}
	goroutines := func() string {
		b := make([]byte, 1<<20)
		return string(b[:goruntime.Stack(b, true)])
	}
	before := fds()
	root := filepath.Join(t.TempDir(), "images")
	for range 3 {
		s, err := image.Open(image.Config{Root: root})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Pull(testContext(t), host+"/web:v1", image.PullOptions{}); err != nil {
			t.Fatal(err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Pull(testContext(t), host+"/web:v1", image.PullOptions{}); !errdefs.IsUnavailable(err) {
			t.Errorf("pull after Close: %v", err)
		}
	}
	// The server's side of the connections ends a moment later.
	for end := time.Now().Add(5 * time.Second); fds() > before+1 && time.Now().Before(end); {
		goruntime.Gosched()
	}
	if n := fds(); n > before+1 { // the listener's poller may have come
		t.Errorf("%d descriptors, %d before", n, before)
	}
	if g := goroutines(); strings.Contains(g, "image.(*store)") || strings.Contains(g, "bbolt") {
		t.Errorf("goroutines are left:\n%s", g)
	}
}
