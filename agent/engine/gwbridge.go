package engine

import (
	"context"
	"net/netip"
	"slices"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/network"

	"skein/overlay"
)

// gatewayBridge is this node's network, of docker's name, by which ports of containers are published that are on networks of the cluster alone. It
// is made when it is needed first; who makes it before decides on its subnets and options, as with docker.
const gatewayBridge = "docker_gwbridge"

func (e *Engine) gatewayNetwork(ctx context.Context) (*localNetwork, error) {
	l, err := e.nets.find(gatewayBridge)
	if !cerrdefs.IsNotFound(err) {
		return l, err
	}
	// Containers of different networks meet here: they must not reach each other.
	_, err = e.NetworkCreate(ctx, network.CreateRequest{Name: gatewayBridge, Driver: driverBridge, EnableIPv6: flag(true),
		Options: map[string]string{optICC: "false", optMasquerade: "true"}})
	if err != nil && !cerrdefs.IsConflict(err) { // somebody else was faster
		return nil, err
	}
	return e.nets.find(gatewayBridge)
}

// publishByBridge leads a container that has no bridge, but a way out and ports to publish, over the gateway bridge instead of the node's block.
// next.Sandbox is what it had before.
func (e *Engine) publishByBridge(ctx context.Context, next record, sb *overlay.Sandbox) error {
	if !sb.Gateway4.IsValid() || len(sb.Bridges) > 0 || len(next.bindings()) == 0 {
		return nil
	}
	l, err := e.gatewayNetwork(ctx)
	if err != nil {
		return err
	}
	var leg overlay.BridgeLeg
	if i := gatewayLegOf(next.Sandbox, l.ID); i >= 0 {
		leg = next.Sandbox.Bridges[i]
	} else if leg, _, err = e.bridgeLeg(next, network.EndpointSettings{NetworkID: l.ID}); err != nil {
		return err
	}
	leg.Names, leg.Links = nil, nil
	sb.Bridges, sb.Gateway4, sb.Gateway6 = []overlay.BridgeLeg{leg}, netip.Addr{}, netip.Addr{}
	var held []overlay.HostPort
	for _, o := range next.Sandbox.Bridges {
		held = append(held, o.Ports...)
	}
	return e.publish(next, sb, held)
}

// onGatewayBridge reports whether a sandbox's way out is the gateway bridge.
func (e *Engine) onGatewayBridge(sb overlay.Sandbox) bool {
	l, err := e.nets.find(gatewayBridge)
	return err == nil && gatewayLegOf(sb, l.ID) >= 0
}

func gatewayLegOf(sb overlay.Sandbox, id string) int {
	return slices.IndexFunc(sb.Bridges, func(b overlay.BridgeLeg) bool { return b.BridgeID == id })
}
