package engine

import (
	"strings"
	"testing"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
)

// TestVolumesFrom follows binds and volumes from container to container.
func TestVolumesFrom(t *testing.T) {
	b := newBench(t)
	dir := t.TempDir()
	one := b.create("one", container.HostConfig{Binds: []string{"data:/data", dir + ":/bind"},
		Mounts: []mount.Mount{{Type: mount.TypeVolume, Target: "/anon"}, {Type: mount.TypeBind, Source: dir, Target: "/other", ReadOnly: true}}})
	two := b.create("two", container.HostConfig{VolumesFrom: []string{"one:ro"}})
	three := b.create("three", container.HostConfig{VolumesFrom: []string{"two", "one:rw"}, Binds: []string{"mine:/data"}})
	show := func(id string) string {
		var out []string
		for _, m := range b.e.mountPoints(b.record(id)) {
			s := string(m.Type) + ":" + m.Destination
			if m.Name == "data" || m.Name == "mine" {
				s += "=" + m.Name
			}
			if !m.RW {
				s += ":ro"
			}
			out = append(out, s)
		}
		return strings.Join(out, " ")
	}
	for _, tc := range []struct{ name, id, want string }{
		{"one", one, "bind:/bind bind:/other:ro volume:/data=data volume:/anon"},
		{"two", two, "bind:/bind:ro bind:/other:ro volume:/data=data:ro volume:/anon:ro"},
		{"three", three, "bind:/bind bind:/other:ro volume:/data=mine volume:/anon"},
	} {
		if got := show(tc.id); got != tc.want {
			t.Errorf("%s has %s, want %s", tc.name, got, tc.want)
		}
	}
	anon := b.record(one).Volumes[1].Name
	if b.record(two).Volumes[1].Name != anon {
		t.Error("the anonymous volume is another one")
	}
	exists := func() bool { return len(b.e.volumeUsers(anon)) > 0 }
	for _, id := range []string{one, three} {
		if err := b.e.ContainerRemove(t.Context(), id, false, true); err != nil {
			t.Fatal(err)
		}
		if _, err := b.e.volumes.Get(anon); err != nil || !exists() {
			t.Errorf("the anonymous volume went before its last container: %v", err)
		}
	}
	if err := b.e.ContainerRemove(t.Context(), two, false, true); err != nil {
		t.Fatal(err)
	}
	if _, err := b.e.volumes.Get(anon); !cerrdefs.IsNotFound(err) {
		t.Errorf("the anonymous volume after its last container: %v", err)
	}
	for from, want := range map[string]string{"nobody": "No such container: nobody", "two:rx": "invalid mode for volumes-from: rx", ":ro": "invalid volumes-from specification"} {
		_, err := b.e.ContainerCreate(t.Context(), "", container.CreateRequest{Config: &container.Config{Image: "busybox"},
			HostConfig: &container.HostConfig{VolumesFrom: []string{from}}}, "")
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("--volumes-from %s: %v, want %q", from, err, want)
		}
	}
}
