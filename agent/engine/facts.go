package engine

import (
	"context"

	"skein/manager/api"
)

// NodeFacts looks at what this node's networks must not get in the way of.
func (e *Engine) NodeFacts(context.Context) (*api.NodeFacts, error) {
	f, err := e.cfg.Network.Facts()
	if err != nil {
		return nil, err
	}
	out := &api.NodeFacts{UnderlayMtu: uint32(f.UnderlayMTU), PathMtu: uint32(f.PathMTU), PathPeer: f.PathPeer, NoSession: f.NoSession}
	for _, r := range f.Routes {
		out.Routes = append(out.Routes, &api.FactRoute{Prefix: r.Prefix.String(), Device: r.Device})
	}
	for _, p := range f.Ports {
		out.Ports = append(out.Ports, &api.FactPort{Protocol: p.Protocol, Port: uint32(p.Port), Holder: p.Holder, Pid: int64(p.PID)})
	}
	return out, nil
}
