package attack

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"skein/runtime/layer"
)

// heap measures, until stop, how much more memory this process has taken than it had.
func heap() (stop func() int64) {
	runtime.GC()
	before := residentBytes()
	ctx, cancel := context.WithCancel(context.Background())
	most := make(chan int64, 1)
	go func() {
		top := before
		tick := time.NewTicker(5 * time.Millisecond)
		defer tick.Stop()
		for ctx.Err() == nil {
			top = max(top, residentBytes())
			<-tick.C
		}
		most <- top
	}()
	return func() int64 {
		cancel()
		return <-most - before
	}
}

// residentBytes is this process's anonymous memory.
func residentBytes() int64 { return anon("/proc/self/status") }

// anon is the anonymous memory that a process's status tells.
func anon(status string) int64 {
	b, err := os.ReadFile(status)
	if err != nil {
		return 0
	}
	var kib int64
	for l := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(l, "RssAnon:"); ok {
			_, _ = fmt.Sscan(v, &kib)
		}
	}
	return kib << 10
}

// TestHostileAccounts: CVE-2026-47262. Files of users and groups that never end, block, or are devices, in an image and as a running container
// makes them: what needs them fails or goes on at once, and the daemon's memory stays as it was. Reading such a file whole takes the
// memory of the daemon; opening it by name hangs on the named pipe and opens the host's devices.
func TestHostileAccounts(t *testing.T) {
	n := newNode(t)
	huge := strings.Repeat("g:x:1:"+strings.Repeat("a", 120)+"\n", 40_000) // 5 MiB
	for name, layer := range map[string][]tar.Header{
		"fifo":    {entry(tar.TypeFifo, "etc/passwd", ""), entry(tar.TypeFifo, "etc/group", "")},
		"zero":    {entry(tar.TypeSymlink, "etc/passwd", "/dev/zero"), entry(tar.TypeSymlink, "etc/group", "../../../../../../dev/zero")},
		"device":  {{Typeflag: tar.TypeChar, Name: "etc/passwd", Devmajor: 1, Devminor: 5, Mode: 0o666}, {Typeflag: tar.TypeChar, Name: "etc/group", Devmajor: 1, Devminor: 5, Mode: 0o666}},
		"huge":    {entry(tar.TypeReg, "etc/passwd", huge), entry(tar.TypeReg, "etc/group", huge)},
		"endless": {entry(tar.TypeReg, "etc/passwd", strings.Repeat("a", 1<<20)), entry(tar.TypeReg, "etc/group", strings.Repeat(":", 1<<20))},
		"many":    {entry(tar.TypeReg, "etc/passwd", "app:x:7:7::/:\n"), entry(tar.TypeReg, "etc/group", groups(40_000))},
		"loop":    {entry(tar.TypeSymlink, "etc/passwd", "group"), entry(tar.TypeSymlink, "etc/group", "passwd")},
	} {
		t.Run(name, func(t *testing.T) {
			n.load(name, ocispec.ImageConfig{}, tarOf(t, layer...))
			stop := heap()
			begun := time.Now()
			for i, user := range []string{"app", "app:app", "7:app", "7"} {
				c := fmt.Sprintf("%s%d", name, i)
				n.must("POST", "/containers/create?name="+c, map[string]any{"Image": name, "User": user, "Cmd": []string{"id"}, "HostConfig": map[string]any{"NetworkMode": "host"}})
				code, text := n.call("POST", "/containers/"+c+"/start", nil)
				if code >= 400 {
					if !strings.Contains(text, "user") && !strings.Contains(text, "group") {
						t.Errorf("user %q: %d %s: does not name the reason", user, code, text)
					}
					continue
				}
				n.waitEnd(c)
				if out := n.output(c); !strings.Contains(out, "id 7 ") {
					t.Errorf("user %q runs as %q", user, out)
				}
			}
			if grown := stop(); grown > 64<<20 {
				t.Errorf("the daemon took %d MiB", grown>>20)
			}
			if d := time.Since(begun); d > 10*time.Second {
				t.Errorf("took %v", d)
			}
		})
	}
	t.Run("swapped while it is read", func(t *testing.T) { swappedAccounts(t, n) })
}

// groups are n groups that the user app is in: more than a process can have.
func groups(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "g%d:x:%d:app\n", i, 1000+i)
	}
	return b.String()
}

// swappedAccounts: a container exchanges its file of users for a pipe that nobody writes to, and for a device, while processes are started
// in it by the name of a user.
func swappedAccounts(t *testing.T, n *node) {
	n.load("swapped", ocispec.ImageConfig{}, tarOf(t, entry(tar.TypeReg, "etc/passwd", "app:x:7:7::/:\n"), entry(tar.TypeFifo, "etc/fifo", ""),
		tar.Header{Typeflag: tar.TypeChar, Name: "etc/zero", Devmajor: 1, Devminor: 5, Mode: 0o666}))
	n.run("swapped", "swapped", nil, "sleep")
	n.startExec(n.exec("swapped", "/inside", "swap", "/etc/passwd", "/etc/fifo"))
	n.startExec(n.exec("swapped", "/inside", "swap", "/etc/fifo", "/etc/zero"))
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range manyRounds(150) {
			var out struct{ ID string }
			body := n.must("POST", "/containers/swapped/exec", map[string]any{"Cmd": []string{"/inside", "exit", "0"}, "User": "app"})
			if json.Unmarshal([]byte(body), &out) == nil {
				n.call("POST", "/exec/"+out.ID+"/start", map[string]any{"Detach": true})
			}
		}
	}()
	select {
	case <-done:
	case <-time.After(20*time.Second + time.Duration(manyRounds(150))*50*time.Millisecond):
		t.Fatal("reading a container's file of users hangs")
	}
}

// TestImageVolumeThroughLinks: CVE-2022-23648. An image declares volumes whose paths lead through links to a directory of the host: what is
// copied into the volume is the image's own, from inside its root, or nothing. Joining the path to the mounted image copies the
// host's directory into the container.
func TestImageVolumeThroughLinks(t *testing.T) {
	n := newNode(t)
	dir, check := victim(t)
	up := strings.Repeat("../", 12)
	trap := tarOf(t, entry(tar.TypeSymlink, "abs", dir), entry(tar.TypeSymlink, "rel", up+dir[1:]), entry(tar.TypeSymlink, "deep", filepath.Dir(dir)),
		entry(tar.TypeSymlink, "chain", "abs/../"+filepath.Base(dir)), entry(tar.TypeReg, dir[1:]+"/own", "of the image"))
	for i, path := range []string{"/abs", "/rel", "/deep/" + filepath.Base(dir), "/chain", "/.." + dir, "/proc/self/root" + dir, "/proc/1/root", "/abs/secret"} {
		name := fmt.Sprintf("evil%d", i)
		n.load(name, ocispec.ImageConfig{Volumes: map[string]struct{}{path: {}}}, trap)
		n.create(name, name, nil, "sleep")
		code, text := n.call("POST", "/containers/"+name+"/start", nil) // may be refused
		own := false
		for _, m := range n.inspect(name)["Mounts"].([]any) {
			src := m.(map[string]any)["Source"].(string)
			es, err := os.ReadDir(src)
			must(t, err)
			for _, e := range es {
				own = own || e.Name() == "own"
				if b, _ := os.ReadFile(filepath.Join(src, e.Name())); e.Name() != "own" || string(b) != "of the image" {
					t.Errorf("volume %s was filled with %s: %q", path, e.Name(), b)
				}
			}
		}
		if i < 5 && !own {
			t.Errorf("volume %s was not filled from inside the image: %d %s", path, code, text)
		}
	}
	check()
}

// TestLabelsAreNotControl: CVE-2026-53488, and the size of what an image says about itself. Labels with every prefix that an engine, a cluster
// or the image store uses for its own change nothing; they come back as they are. A config with more of anything than containers can
// carry is refused when it comes.
func TestLabelsAreNotControl(t *testing.T) {
	n := newNode(t)
	dir, check := victim(t)
	labels := map[string]string{}
	for _, k := range []string{"com.docker.swarm.task.id", "com.docker.swarm.service.id", "com.docker.swarm.node.id", "com.docker.volume.anonymous", "com.docker.compose.project",
		"containerd.io/gc.root", "containerd.io/gc.expire", "containerd.io/gc.ref.content.config", "containerd.io/gc.ref.snapshot.overlayfs", "containerd.io/snapshot.ref",
		"containerd.io/restart.status", "containerd.io/restart.loguri", "containerd.io/uncompressed", "io.containerd.runc.v2.group", "io.containerd.image.name",
		"io.kubernetes.cri.container-type", "org.opencontainers.image.ref.name", "skein", "skein.io/task", "skein.privileged", "run.oci.hooks.stdout", "io.balena.features.host"} {
		labels[k] = "binary:///bin/touch?" + dir + "/mark"
	}
	n.load("labels", ocispec.ImageConfig{Labels: labels})
	n.run("labels", "labels", nil, "sleep")
	in := n.inspect("labels")
	got := in["Config"].(map[string]any)["Labels"].(map[string]any)
	for k, v := range labels {
		if got[k] != v {
			t.Errorf("label %s became %v", k, got[k])
		}
	}
	if hc := in["HostConfig"].(map[string]any); hc["Privileged"] != false || hc["RestartPolicy"].(map[string]any)["Name"] == "always" {
		t.Errorf("labels became options: %v", hc)
	}
	if s := n.must("GET", "/containers/json", nil); !strings.Contains(s, `/labels"`) {
		t.Errorf("the container is not listed as the user's own: %s", s)
	}
	n.must("DELETE", "/containers/labels?force=1", nil)
	n.must("DELETE", "/images/labels", nil)
	if code, _ := n.call("GET", "/images/labels/json", nil); code != 404 {
		t.Errorf("labels keep the image: %d", code)
	}
	check()

	many := func(n int) []string {
		out := make([]string, n)
		for i := range out {
			out[i] = fmt.Sprintf("k%d=", i)
		}
		return out
	}
	set := func(n int, f string) map[string]struct{} {
		out := map[string]struct{}{}
		for i := range n {
			out[fmt.Sprintf(f, i)] = struct{}{}
		}
		return out
	}
	tooMany := map[string]string{}
	for _, k := range many(5000) {
		tooMany[k] = ""
	}
	for what, c := range map[string]ocispec.ImageConfig{"Env": {Env: many(300_000)}, "Labels": {Labels: tooMany}, "Volumes": {Volumes: set(129, "/v%d")},
		"ExposedPorts": {ExposedPorts: set(5000, "%d/tcp")}, "Entrypoint": {Entrypoint: many(300_000)}} {
		l := program(t)
		code, text := n.call("POST", "/images/load", bytes.NewReader(archive(t, []string{"big:latest"}, imageConfig(c, l), l)))
		if !strings.Contains(text, what+" has ") {
			t.Errorf("too many %s: %d %.200s", what, code, text)
		}
	}
}

// TestHostileArchive: CVE-2026-50195, -53489, -53492. An archive that is loaded names only its own images, holds its files by content, and is
// followed nowhere: not by its links, not by paths, not by annotations. One that cannot be an image is refused and leaves nothing.
func TestHostileArchive(t *testing.T) {
	n := newNode(t)
	dir, check := victim(t)
	n.load("good", ocispec.ImageConfig{})
	good := n.must("GET", "/images/good/json", nil)
	l := tarOf(t, entry(tar.TypeReg, "inside", "not the one that is here"))
	cfg, err := json.Marshal(imageConfig(ocispec.ImageConfig{}, l))
	if err != nil {
		t.Fatal(err)
	}
	id := digest.FromBytes(cfg)
	manifest := manifestOf(cfg, l)
	mraw, err := json.Marshal(manifest)
	if err != nil {
		t.Fatal(err)
	}
	blob := func(b []byte) tar.Header {
		return entry(tar.TypeReg, "blobs/sha256/"+digest.FromBytes(b).Encoded(), string(b))
	}
	index := func(ann map[string]string, d ocispec.Descriptor) tar.Header {
		d.Annotations = ann
		raw, err := json.Marshal(ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{d}})
		if err != nil {
			t.Fatal(err)
		}
		return entry(tar.TypeReg, "index.json", string(raw))
	}
	own := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromBytes(mraw), Size: int64(len(mraw))}
	docker := func(config, layer string, tags ...string) tar.Header {
		raw, err := json.Marshal([]any{map[string]any{"Config": config, "Layers": []string{layer}, "RepoTags": tags}})
		if err != nil {
			t.Fatal(err)
		}
		return entry(tar.TypeReg, "manifest.json", string(raw))
	}
	for what, files := range map[string][]tar.Header{
		"config is a link to a file of the host":  {entry(tar.TypeSymlink, "c.json", dir+"/secret"), entry(tar.TypeReg, "l.tar", string(l)), docker("c.json", "l.tar", "bad:1")},
		"layer is a link to a file of the host":   {entry(tar.TypeReg, "c.json", string(cfg)), entry(tar.TypeSymlink, "l.tar", "../../../../../.."+dir+"/secret"), docker("c.json", "l.tar", "bad:1")},
		"layer is a hard link":                    {entry(tar.TypeReg, "c.json", string(cfg)), entry(tar.TypeLink, "l.tar", dir+"/secret"), docker("c.json", "l.tar", "bad:1")},
		"layer is a device":                       {entry(tar.TypeReg, "c.json", string(cfg)), {Typeflag: tar.TypeBlock, Name: "l.tar", Devmajor: 8}, docker("c.json", "l.tar", "bad:1")},
		"names a file outside":                    {entry(tar.TypeReg, "c.json", string(cfg)), docker("c.json", "../../../../.."+dir+"/secret", "bad:1")},
		"blob under another's digest":             {entry(tar.TypeReg, "blobs/sha256/"+id.Encoded(), "{}"), blob(mraw), blob(l), index(nil, own)},
		"manifest's layer is missing":             {blob(cfg), blob(mraw), index(nil, own)},
		"claims the digest of another":            {blob(cfg), blob(mraw), blob(l), index(map[string]string{"io.containerd.image.name": "good@sha256:" + strings.Repeat("1", 64)}, own)},
		"tag claims the digest of another":        {entry(tar.TypeReg, "c.json", string(cfg)), entry(tar.TypeReg, "l.tar", string(l)), docker("c.json", "l.tar", "good@sha256:"+strings.Repeat("1", 64))},
		"broken tag":                              {entry(tar.TypeReg, "c.json", string(cfg)), entry(tar.TypeReg, "l.tar", string(l)), docker("c.json", "l.tar", "../../etc/passwd")},
		"links in a circle":                       {entry(tar.TypeReg, "c.json", string(cfg)), entry(tar.TypeSymlink, "a", "b"), entry(tar.TypeSymlink, "b", "a"), docker("c.json", "a", "bad:1")},
		"blob that is no digest":                  {entry(tar.TypeReg, "blobs/sha256/../../../x", "evil"), entry(tar.TypeReg, "blobs/sha256/xyz", "evil"), index(nil, own)},
		"index of a size that is not its blob's":  {blob(cfg), blob(mraw), blob(l), index(nil, ocispec.Descriptor{MediaType: own.MediaType, Digest: own.Digest, Size: own.Size + 1})},
		"index that says its manifest is a layer": {blob(cfg), blob(mraw), blob(l), index(nil, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: own.Digest, Size: own.Size})},
		"checkpoint":                              {entry(tar.TypeReg, "checkpoint/x.img", "x"), entry(tar.TypeReg, "config.dump", "{}"), entry(tar.TypeReg, "spec.dump", "{}")},
		"name of a megabyte":                      {entry(tar.TypeReg, strings.Repeat("x/", 400_000)+"x", ""), docker("c.json", "l.tar", "bad:1")},
		"nothing":                                 {},
	} {
		code, text := n.call("POST", "/images/load", bytes.NewReader(tarOf(t, files...)))
		if code < 400 && !strings.Contains(text, "errorDetail") {
			t.Errorf("%s: loaded: %d %s", what, code, text)
		}
		if list := n.must("GET", "/images/json", nil); strings.Count(list, `"Id"`) != 1 {
			t.Errorf("%s: images %s", what, list)
		}
		if now := n.must("GET", "/images/good/json", nil); now != good {
			t.Errorf("%s: the image that was there changed: %s", what, now)
		}
	}
	// Annotations and names: only what the archive's own list says.
	other := imageConfig(ocispec.ImageConfig{Env: []string{"OTHER=1"}}, l)
	raw, err := json.Marshal(other)
	if err != nil {
		t.Fatal(err)
	}
	m2 := manifestOf(raw, l)
	m2.Annotations = map[string]string{"io.containerd.image.name": "docker.io/library/good:latest", "org.opencontainers.image.ref.name": "good:latest", "containerd.io/gc.root": "x"}
	m2raw, err := json.Marshal(m2)
	if err != nil {
		t.Fatal(err)
	}
	d2 := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromBytes(m2raw), Size: int64(len(m2raw)), URLs: []string{"http://127.0.0.1:1/x"}}
	out := n.must("POST", "/images/load", bytes.NewReader(tarOf(t, blob(raw), blob(m2raw), blob(l), index(map[string]string{"org.opencontainers.image.ref.name": "good", "containerd.io/gc.root": "1"}, d2))))
	if !strings.Contains(out, "Loaded image ID: "+digest.FromBytes(raw).String()) || n.must("GET", "/images/good/json", nil) != good {
		t.Errorf("annotations inside became names: %s", out)
	}
	check()
}

// TestUnpackWhileSwapping: CVE-2025-47290, CVE-2021-32760. Several layers are unpacked while somebody exchanges their directories for links to the
// host's as fast as he can: nothing of the host is made, removed, given away or changed in its mode. (Nobody can reach a layer while it is
// unpacked; this is the second line.) Setting attributes or making files by path hits the host within a few rounds.
func TestUnpackWhileSwapping(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	dir, check := victim(t)
	base := t.TempDir()
	evil := []tar.Header{entry(tar.TypeDir, "d", ""), entry(tar.TypeReg, "d/secret", "evil"), {Typeflag: tar.TypeSymlink, Name: "d/link", Linkname: "x", Uid: 1000},
		{Typeflag: tar.TypeFifo, Name: "d/fifo", Mode: 0o4777, Uid: 1000}, entry(tar.TypeReg, "d/secret", "again"), entry(tar.TypeDir, "d/sub", ""),
		{Typeflag: tar.TypeDir, Name: "d", Mode: 0o4777, Uid: 1000, Gid: 1000}, entry(tar.TypeLink, "d/hard", "d/secret"), entry(tar.TypeReg, "secret", "mine")}
	for range 30 {
		evil = append(evil, tar.Header{Typeflag: tar.TypeFifo, Name: "secret", Mode: 0o4777, Uid: 1000}, entry(tar.TypeReg, "secret", "mine"))
	}
	raw := tarOf(t, evil...)
	st := func() unix.Stat_t {
		var st unix.Stat_t
		if err := unix.Stat(dir, &st); err != nil {
			t.Fatal(err)
		}
		return st
	}
	before := st()
	for i := range manyRounds(60) {
		dst := filepath.Join(base, "layer")
		must(t, os.Mkdir(dst, 0o755))
		link, file := filepath.Join(base, "link"), filepath.Join(base, "file")
		must(t, os.Symlink(dir, link))
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan struct{})
		go func() {
			defer close(done)
			for ctx.Err() == nil {
				_ = unix.Renameat2(unix.AT_FDCWD, filepath.Join(dst, "d"), unix.AT_FDCWD, link, unix.RENAME_EXCHANGE)
				_ = os.Symlink(filepath.Join(dir, "secret"), file)
				_ = os.Rename(file, filepath.Join(dst, "secret"))
			}
		}()
		_, _ = layer.Apply(context.Background(), dst, bytes.NewReader(raw), layer.Options{}) // may be refused
		cancel()
		<-done
		must(t, os.RemoveAll(dst))
		must(t, os.RemoveAll(link))
		must(t, os.RemoveAll(file))
		if now := st(); now.Mode != before.Mode || now.Uid != before.Uid || now.Mtim != before.Mtim {
			t.Fatalf("round %d: the host's directory became %o of %d", i, now.Mode, now.Uid)
		}
	}
	check()
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
