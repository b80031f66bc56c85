package engine

import (
	"slices"
	"testing"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
)

// TestRenameInDNS: a running container answers to its new name, and to its aliases as before.
func TestRenameInDNS(t *testing.T) {
	b := newBench(t)
	if _, err := b.e.NetworkCreate(t.Context(), network.CreateRequest{Name: "nn"}); err != nil {
		t.Fatal(err)
	}
	id := b.run("one", container.HostConfig{NetworkMode: "nn"})
	before := slices.Clone(b.record(id).Sandbox.Bridges[0].Names)
	if err := b.e.ContainerRename(t.Context(), id, "two"); err != nil {
		t.Fatal(err)
	}
	want := append([]string{"two"}, before[1:]...)
	b.net.mu.Lock()
	got := b.net.boxes[id].Bridges[0].Names
	b.net.mu.Unlock()
	if before[0] != "one" || !slices.Equal(got, want) {
		t.Errorf("the network answers to %q, before %q, want %q", got, before, want)
	}
	if got := b.record(id).Networks["nn"].DNSNames; !slices.Equal(got, want) {
		t.Errorf("the record says %q", got)
	}
}
