package image_test

import (
	"archive/tar"
	"strings"
	"sync"
	"testing"

	"skein/runtime/image"
)

func threeLayers(t testing.TB, kinds string) *built {
	return build(t, kinds,
		tarOf(t, dir("etc/", 0o750), f("etc/keep", "keep"), f("etc/gone", "gone"), dir("opq/", 0o755), f("opq/old", "old"), f("first", "1"),
			link(tar.TypeLink, "second", "first"), link(tar.TypeSymlink, "sym", "/etc/keep")),
		tarOf(t, f("etc/.wh.gone", ""), f("opq/new", "new"), f("opq/.wh..wh..opq", "")),
		tarOf(t, f("etc/late", "late"), f("first", "one")))
}

func TestPull(t *testing.T) {
	reg, host := newRegistry(t)
	b := threeLayers(t, "gzip zstd none")
	want := b.push(t, reg, "web:v1")
	s, _ := newStore(t)
	ctx := testContext(t)

	var mu sync.Mutex
	seen := map[string]bool{}
	img, err := s.Pull(ctx, host+"/web:v1", image.PullOptions{Progress: func(p image.Progress) {
		mu.Lock()
		defer mu.Unlock()
		seen[p.Action] = true
	}})
	if err != nil {
		t.Fatal(err)
	}
	if img.Target.Digest != want || img.ID != b.manifest.Config.Digest || len(img.Tags) != 1 || img.Tags[0] != host+"/web:v1" {
		t.Errorf("got %+v", img)
	}
	if img.Labels["a"] != "b" || img.Config.Config.Cmd[0] != "/bin/sh" || img.Size == 0 {
		t.Errorf("config: got %+v", img)
	}
	for _, a := range []string{"Pulling fs layer", "Downloading", "Download complete", "Extracting", "Pull complete"} {
		if !seen[a] {
			t.Errorf("no progress %q in %v", a, seen)
		}
	}
	for _, ref := range []string{host + "/web:v1", img.ID.String(), img.ID.Encoded()[:12], host + "/web@" + want.String(), host + "/web:v1@" + want.String()} {
		got, err := s.Get(ctx, ref)
		if err != nil || got.ID != img.ID {
			t.Errorf("Get(%s): %v, %v", ref, got.ID, err)
		}
	}
	ms, err := s.Prepare(ctx, "c1", img)
	if err != nil {
		t.Fatal(err)
	}
	if ms[0].Type != "overlay" || !strings.Contains(strings.Join(ms[0].Options, ","), "upperdir=") {
		t.Errorf("mounts: %+v", ms)
	}
	if again, err := s.Prepare(ctx, "c1", img); err != nil || len(again) != 1 {
		t.Errorf("Prepare again: %v, %v", again, err)
	}
	checkTree(t, ms[0], map[string]string{"etc/keep": "keep", "etc/gone": "-", "etc/late": "late", "opq/old": "-", "opq/new": "new", "first": "one",
		"second": "1", "sym": "keep", "etc": "mode 0750"})
}
