package engine

import (
	"testing"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"

	"skein/manager/api"
	"skein/overlay"
)

// A task of a service on the network "host" gets no network of its own.
func TestTaskOnHostNetwork(t *testing.T) {
	b := newBench(t)
	a := &api.Assignment{TaskId: "t1", ServiceName: "web", Slot: 1, SpecJson: []byte(`{"ContainerSpec":{"Image":"busybox"},"Networks":[{"Target":"host"}]}`)}
	ctl, err := b.e.Controller(a, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := ctl.Prepare(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := ctl.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	id := ctl.Info().ContainerID
	if box, ok := b.net.boxes[id]; ok {
		t.Errorf("a sandbox was made: %+v", box)
	}
	c, err := b.e.ContainerInspect(t.Context(), id, false)
	if err != nil {
		t.Fatal(err)
	}
	if c.HostConfig.NetworkMode != "host" || c.Config.Hostname != b.e.cfg.Hostname {
		t.Errorf("network mode %q, host name %q", c.HostConfig.NetworkMode, c.Config.Hostname)
	}
}

// A port is listed once: published, or else as exposed.
func TestSummaryPorts(t *testing.T) {
	b := newBench(t)
	r := record{ID: "abcdefabcdefabcdef", Name: "x", Config: &container.Config{ExposedPorts: network.PortSet{
		network.MustParsePort("80/tcp"): {}, network.MustParsePort("81/tcp"): {},
	}}, HostConfig: &container.HostConfig{}, Sandbox: overlay.Sandbox{Bridges: []overlay.BridgeLeg{{Ports: []overlay.HostPort{{Published: 8080, Target: 80, Protocol: "tcp"}}}}}}
	got := b.e.summary(t.Context(), &entry{}, r).Ports
	if len(got) != 2 || got[0].PublicPort != 8080 || got[1].PrivatePort != 81 || got[1].PublicPort != 0 {
		t.Errorf("ports %+v", got)
	}
}
