package engine

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"

	"skein/agent/dockerapi"
)

func tarOf(t *testing.T, entries ...tar.Header) io.Reader {
	t.Helper()
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	for _, h := range entries {
		body := []byte("text")
		if h.Typeflag == tar.TypeReg {
			h.Size = int64(len(body))
		}
		h.Uid, h.Gid = os.Getuid(), os.Getgid()
		if err := tw.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			if _, err := tw.Write(body); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return &b
}

// The fake's root filesystem is one directory, so that a stopped container's files are those of images.layer.
func TestArchive(t *testing.T) {
	b := newBench(t)
	id := b.create("one", container.HostConfig{})
	root, outside := b.images.layer, t.TempDir()
	if err := os.MkdirAll(root+"/etc/deep", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(root+"/etc/deep/f", []byte("hello"), 0o640); err != nil {
		t.Fatal(err)
	}
	for link, to := range map[string]string{"/out": outside, "/up": "../../../../etc", "/rel": "etc/deep"} {
		if err := os.Symlink(to, root+link); err != nil {
			t.Fatal(err)
		}
	}
	for name, want := range map[string]struct {
		base, link string
	}{"/etc/deep/f": {"f", ""}, "rel": {"rel", "/etc/deep"}, "/rel/f": {"f", ""}, "/up/deep/f": {"f", ""}, "/../../etc/deep/f": {"f", ""}} {
		st, err := b.e.ArchiveStat(t.Context(), id, name)
		if err != nil || st.Name != want.base || st.LinkTarget != want.link {
			t.Errorf("stat %s: %+v %v", name, st, err)
		}
	}
	if _, err := b.e.ArchiveStat(t.Context(), id, "/out/x"); !cerrdefs.IsNotFound(err) {
		t.Errorf("a link out of the container: %v, want not found", err)
	}

	var buf bytes.Buffer
	if err := b.e.ArchiveGet(t.Context(), id, "/etc", func(container.PathStat) (io.Writer, error) { return &buf, nil }); err != nil {
		t.Fatal(err)
	}
	var names []string
	for tr := tar.NewReader(&buf); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, h.Name)
	}
	if got, want := len(names), 3; got != want || names[0] != "etc/" || names[2] != "etc/deep/f" {
		t.Errorf("archive has %v", names)
	}

	if err := b.e.ArchivePut(t.Context(), id, "/etc", dockerapi.ArchiveOptions{}, tarOf(t,
		tar.Header{Typeflag: tar.TypeDir, Name: "new/", Mode: 0o750}, tar.Header{Typeflag: tar.TypeReg, Name: "new/f", Mode: 0o4755},
		tar.Header{Typeflag: tar.TypeLink, Name: "hard", Linkname: "new/f"}, tar.Header{Typeflag: tar.TypeSymlink, Name: "soft", Linkname: "/etc/x"})); err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(root + "/etc/hard"); err != nil || st.Mode() != 0o755|os.ModeSetuid {
		t.Errorf("hard link: %v %v", st, err)
	}
	for what, bad := range map[string][]tar.Header{
		"a name outside":     {{Typeflag: tar.TypeReg, Name: "../../f", Mode: 0o644}},
		"through a link out": {{Typeflag: tar.TypeSymlink, Name: "l", Linkname: outside}, {Typeflag: tar.TypeReg, Name: "l/f", Mode: 0o644}},
		"a hard link out":    {{Typeflag: tar.TypeLink, Name: "h", Linkname: "../../../../../../etc/passwd"}},
		"a device":           {{Typeflag: tar.TypeBlock, Name: "sda", Devmajor: 8, Mode: 0o666}},
	} {
		if err := b.e.ArchivePut(t.Context(), id, "/etc", dockerapi.ArchiveOptions{}, tarOf(t, bad...)); err == nil {
			t.Errorf("%s was extracted", what)
		}
	}
	if left, _ := os.ReadDir(outside); len(left) != 0 {
		t.Errorf("outside of the container: %v", left)
	}
	for _, c := range []struct {
		name string
		h    tar.Header
	}{{"a directory over a file", tar.Header{Typeflag: tar.TypeDir, Name: "f", Mode: 0o755}}, {"a file over a directory", tar.Header{Typeflag: tar.TypeReg, Name: "../etc/deep", Mode: 0o644}}} {
		if err := b.e.ArchivePut(t.Context(), id, "/etc/deep", dockerapi.ArchiveOptions{NoOverwriteDirNonDir: true}, tarOf(t, c.h)); err == nil {
			t.Errorf("%s was extracted", c.name)
		}
	}
	if err := b.e.ArchivePut(t.Context(), id, "/etc/deep/f", dockerapi.ArchiveOptions{}, tarOf(t)); !cerrdefs.IsInvalidArgument(err) {
		t.Errorf("into a file: %v", err)
	}
	if err := b.e.ArchivePut(t.Context(), id, "/nowhere", dockerapi.ArchiveOptions{}, tarOf(t)); !cerrdefs.IsNotFound(err) {
		t.Errorf("into nothing: %v", err)
	}
}

func TestVolumes(t *testing.T) {
	b := newBench(t)
	if err := os.MkdirAll(filepath.Join(b.images.layer, "data"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(b.images.layer, "data", "seed"), []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	b.images.img.Config.Config.Volumes = map[string]struct{}{"/auto": {}}
	id := b.run("one", container.HostConfig{Binds: []string{"data:/data"}})
	if _, err := os.Stat(b.e.volumes.Path("data") + "/seed"); err != nil {
		t.Errorf("the volume was not filled: %v", err)
	}
	in, _ := b.e.ContainerInspect(t.Context(), id, false)
	if len(in.Mounts) != 2 || in.Mounts[0].Name != "data" || in.Mounts[1].Destination != "/auto" {
		t.Fatalf("mounts %+v", in.Mounts)
	}
	if err := b.e.VolumeRemove(t.Context(), "data", false); !cerrdefs.IsConflict(err) {
		t.Errorf("rm of a used volume: %v", err)
	}
	b.restart()
	if err := b.e.VolumeRemove(t.Context(), "data", true); !cerrdefs.IsConflict(err) {
		t.Errorf("rm of a used volume after a restart: %v", err)
	}
	if err := b.e.ContainerRemove(t.Context(), id, true, true); err != nil {
		t.Fatal(err)
	}
	if l, _ := b.e.VolumeList(t.Context(), nil); len(l) != 1 || l[0].Name != "data" {
		t.Errorf("after rm -v: %+v", l)
	}
	if rep, err := b.e.VolumesPrune(t.Context(), nil); err != nil || len(rep.VolumesDeleted) != 0 {
		t.Errorf("prune took %v %v", rep, err)
	}
	if err := b.e.VolumeRemove(t.Context(), "data", false); err != nil {
		t.Error(err)
	}
	if err := b.e.VolumeRemove(t.Context(), "data", false); !cerrdefs.IsNotFound(err) {
		t.Errorf("second rm: %v", err)
	}
	// A container that is refused leaves no volume behind.
	if _, err := b.e.ContainerCreate(t.Context(), "two", container.CreateRequest{Config: &container.Config{Image: "busybox"},
		HostConfig: &container.HostConfig{Binds: []string{"xx:/x", "yy:/x"}}}, ""); !cerrdefs.IsInvalidArgument(err) {
		t.Errorf("one target twice: %v", err)
	}
	b.create("three", container.HostConfig{})
	if _, err := b.e.ContainerCreate(t.Context(), "three", container.CreateRequest{Config: &container.Config{Image: "busybox"}}, ""); !cerrdefs.IsConflict(err) {
		t.Errorf("taken name: %v", err)
	}
	if l, _ := b.e.VolumeList(t.Context(), nil); len(l) != 1 {
		t.Errorf("volumes left: %+v", l)
	}
	rm := container.HostConfig{AutoRemove: true}
	id = b.run("four", rm)
	c, _ := b.e.find(id)
	ch, _ := b.e.ContainerWait(t.Context(), id, container.WaitConditionRemoved)
	b.sup.exit(c.rec.ID, b.sup.states[id].Exit)
	<-ch
	if l, _ := b.e.VolumeList(t.Context(), nil); len(l) != 1 {
		t.Errorf("volumes left after --rm: %+v", l)
	}
}

func TestConnect(t *testing.T) {
	b := newBench(t)
	ctx := t.Context()
	made, err := b.e.NetworkCreate(ctx, network.CreateRequest{Name: "back"})
	if err != nil {
		t.Fatal(err)
	}
	hc := publish("8080")
	id := b.run("one", hc)
	req := network.ConnectRequest{Container: "one", EndpointConfig: &network.EndpointSettings{Aliases: []string{"db"}}}
	if err := b.e.NetworkConnect(ctx, "back", req); err != nil {
		t.Fatal(err)
	}
	if err := b.e.NetworkConnect(ctx, "back", req); err == nil {
		t.Error("connected twice")
	}
	box := b.net.boxes[id]
	if len(box.Bridges) != 2 || box.Bridges[1].BridgeID != made.ID || !box.DNS || len(box.Bridges[1].Ports) != 1 {
		t.Errorf("sandbox %+v", box)
	}
	if f, _ := os.ReadFile(b.e.containerDir(id) + "/resolv.conf"); !bytes.Contains(f, []byte("127.0.0.11")) {
		t.Errorf("resolv.conf is %q", f)
	}
	if err := b.e.NetworkRemove(ctx, "back"); !errors.Is(err, errDenied) {
		t.Errorf("rm of a used network: %v", err)
	}
	// Ports move to the network that is left.
	if err := b.e.NetworkDisconnect(ctx, "bridge", network.DisconnectRequest{Container: "one"}); err != nil {
		t.Fatal(err)
	}
	if box := b.net.boxes[id]; len(box.Bridges) != 1 || len(box.Bridges[0].Ports) != 1 {
		t.Errorf("sandbox %+v", box)
	}
	b.restart()
	if err := b.e.ContainerRestart(ctx, id, dockerapi.StopOptions{}); err != nil {
		t.Fatal(err)
	}
	if r := b.record(id); len(r.Networks) != 1 || r.Networks["back"] == nil || r.Networks["back"].Aliases[0] != "db" {
		t.Errorf("after a restart: %+v", r.Networks)
	}
	if err := b.e.NetworkConnect(ctx, "bridge", network.ConnectRequest{Container: "one"}); err != nil {
		t.Fatal(err)
	}
	if err := b.e.NetworkDisconnect(ctx, "back", network.DisconnectRequest{Container: "one"}); err != nil {
		t.Fatal(err)
	}
	if box := b.net.boxes[id]; len(box.Bridges) != 1 || !box.DNS {
		t.Errorf("a running container lost its resolver: %+v", box)
	}
	if err := b.e.NetworkConnect(ctx, "back", network.ConnectRequest{Container: "one"}); err != nil {
		t.Fatal(err)
	}
	if err := b.e.NetworkDisconnect(ctx, "bridge", network.DisconnectRequest{Container: "one"}); err != nil {
		t.Fatal(err)
	}
	// What the kernel refuses changes nothing.
	b.net.mu.Lock()
	b.net.err = errors.New("no")
	b.net.mu.Unlock()
	if err := b.e.NetworkConnect(ctx, "bridge", network.ConnectRequest{Container: "one"}); err == nil {
		t.Error("connected")
	}
	b.net.mu.Lock()
	b.net.err = nil
	b.net.mu.Unlock()
	if n := b.e.nets.inUse(); n != 1 {
		t.Errorf("%d addresses are in use, want 1", n)
	}
	if err := b.e.NetworkDisconnect(ctx, "back", network.DisconnectRequest{Container: "one"}); err != nil {
		t.Fatal(err)
	}
	if err := b.e.NetworkRemove(ctx, "back"); err != nil {
		t.Error(err)
	}
}

func TestUpdateLimits(t *testing.T) {
	b := newBench(t)
	id := b.run("one", container.HostConfig{Resources: container.Resources{Memory: 64 << 20, NanoCPUs: 1e9}})
	up := container.UpdateConfig{Resources: container.Resources{Memory: 128 << 20, MemorySwap: 256 << 20}}
	if _, err := b.e.ContainerUpdate(t.Context(), id, up); err != nil {
		t.Fatal(err)
	}
	if hc := b.record(id).HostConfig; hc.Memory != 128<<20 || hc.NanoCPUs != 1e9 {
		t.Errorf("limits %+v", hc.Resources)
	}
	b.sup.set("update", errors.New("kernel says no"))
	if _, err := b.e.ContainerUpdate(t.Context(), id, container.UpdateConfig{Resources: container.Resources{CPUShares: 5}}); err == nil || b.record(id).HostConfig.CPUShares != 0 {
		t.Errorf("refused limits were recorded: %v", err)
	}
	if _, err := b.e.ContainerUpdate(t.Context(), id, container.UpdateConfig{Resources: container.Resources{Memory: 1}}); !cerrdefs.IsInvalidArgument(err) {
		t.Errorf("1 byte of memory: %v", err)
	}
}
