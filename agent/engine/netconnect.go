package engine

import (
	"context"
	"errors"
	"maps"
	"slices"

	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/network"

	"skein/overlay"
)

// NetworkConnect attaches a container, running or not, to a further bridge network.
func (e *Engine) NetworkConnect(ctx context.Context, ref string, req network.ConnectRequest) error {
	if done, err := e.connectCluster(ctx, ref, req); done {
		return err
	}
	l, err := e.nets.find(ref)
	if err != nil {
		return err
	}
	c, err := e.find(req.Container)
	if err != nil {
		return err
	}
	if err := c.lock(); err != nil {
		return err
	}
	defer c.op.Unlock()
	r := c.snapshot()
	if err := changeable(r, l); err != nil {
		return err
	}
	if _, ok := r.Networks[l.Name]; ok {
		return errf(errDenied, "endpoint with name %s already exists in network %s", r.Name, l.Name)
	}
	wish := req.EndpointConfig
	if wish == nil {
		wish = &network.EndpointSettings{}
	}
	s, err := endpoint(l, wish)
	if err != nil {
		return err
	}
	nets := maps.Clone(r.Networks)
	if nets == nil {
		nets = map[string]*network.EndpointSettings{}
	}
	delete(nets, "none") // the mode of a container that had no network
	nets[l.Name] = s
	if err := e.rewire(ctx, c, nets); err != nil {
		return err
	}
	e.emitEndpoint(l, r.ID, events.ActionConnect)
	return nil
}

// NetworkDisconnect takes a container off a network.
func (e *Engine) NetworkDisconnect(ctx context.Context, ref string, req network.DisconnectRequest) error {
	if done, err := e.disconnectCluster(ctx, ref, req); done {
		return err
	}
	l, err := e.nets.find(ref)
	if err != nil {
		return err
	}
	c, err := e.find(req.Container)
	if err != nil {
		return err
	}
	if err := c.lock(); err != nil {
		return err
	}
	defer c.op.Unlock()
	r := c.snapshot()
	if err := changeable(r, l); err != nil {
		return err
	}
	if _, ok := r.Networks[l.Name]; !ok {
		return errf(errDenied, "container %s is not connected to network %s", r.ID, l.Name)
	}
	nets := maps.Clone(r.Networks)
	delete(nets, l.Name)
	if err := e.rewire(ctx, c, nets); err != nil {
		return err
	}
	e.emitEndpoint(l, r.ID, events.ActionDisconnect)
	return nil
}

// renameInDNS makes a running container answer to its new name on the networks that users made. The caller holds c.op.
func (e *Engine) renameInDNS(ctx context.Context, c *entry, old string) error {
	r := c.snapshot()
	if r.Attached {
		e.attachmentsChanged()
	}
	sb, nets := r.Sandbox, maps.Clone(r.Networks)
	sb.Bridges = slices.Clone(sb.Bridges)
	changed := false
	for i := range sb.Bridges {
		l := &sb.Bridges[i]
		if len(l.Names) == 0 || l.Names[0] != old {
			continue
		}
		changed = true
		l.Names = append([]string{r.Name}, l.Names[1:]...)
		for name, s := range nets {
			if s.NetworkID == l.BridgeID {
				renamed := *s
				renamed.DNSNames = l.Names
				nets[name] = &renamed
			}
		}
	}
	if !changed || !r.State.active() {
		return nil // a start gives the names anew
	}
	if err := e.update(c, func(r *record) { r.Sandbox, r.Networks = sb, nets }); err != nil {
		return err
	}
	_, err := e.cfg.Network.AddSandbox(context.WithoutCancel(ctx), sb)
	return err
}

// changeable refuses containers whose networks are not theirs to choose.
func changeable(r record, l *localNetwork) error {
	switch {
	case r.Task != "":
		return errf(errDenied, "container %s belongs to a service: change the service's networks", r.Name)
	case r.HostConfig.NetworkMode.IsHost() || l.Driver == "host":
		return errf(errDenied, "container cannot be disconnected from host network or connected to host network")
	case r.HostConfig.NetworkMode.IsContainer():
		return errf(errDenied, "container sharing network namespace with another container or host cannot be connected to any other network")
	case l.Driver == "null":
		return errf(errDenied, "container cannot be connected to network %s", l.Name)
	}
	return nil
}

// rewire gives a container the networks. A running one keeps its namespace and the addresses of those that stay. The caller holds c.op.
func (e *Engine) rewire(ctx context.Context, c *entry, nets map[string]*network.EndpointSettings) error {
	old := c.snapshot()
	if !old.State.active() {
		if old.Attached {
			defer e.attachmentsChanged()
		}
		return e.update(c, func(r *record) { r.Networks = nets })
	}
	next := old
	next.Networks = maps.Clone(nets)
	sb, err := e.rewiredSandbox(old, &next)
	if err == nil && len(onCluster(old))+len(onCluster(next)) > 0 {
		defer e.settled(old.ID)
		err = e.place(ctx, next, &sb, next.Networks)
	}
	if err == nil {
		next.Sandbox, next.Attached = sb, old.Attached || len(sb.Legs) > 0
		// Recorded first: a crash in between is mended when the container is adopted.
		err = e.update(c, func(r *record) { r.Sandbox, r.Networks, r.Attached = next.Sandbox, next.Networks, next.Attached })
	}
	if err == nil {
		if _, err = e.cfg.Network.AddSandbox(ctx, sb); err != nil {
			_, back := e.cfg.Network.AddSandbox(context.WithoutCancel(ctx), old.Sandbox)
			err = errors.Join(err, back, e.update(c, func(r *record) { r.Sandbox, r.Networks = old.Sandbox, old.Networks }))
		}
	}
	kept, ports := next.Networks, next.published()
	if err != nil {
		kept, ports = old.Networks, old.published()
	}
	e.ports.retain(old.ID, ports)
	for _, nets := range []map[string]*network.EndpointSettings{old.Networks, next.Networks} {
		for name, s := range nets {
			if _, ok := kept[name]; !ok {
				e.nets.give(s.NetworkID, old.ID)
			}
		}
	}
	if err != nil {
		return err
	}
	return e.refreshNetworkFiles(old, next)
}

// rewiredSandbox is the sandbox of a running container on next's networks: legs that stay as they are, new ones after them.
func (e *Engine) rewiredSandbox(old record, next *record) (overlay.Sandbox, error) {
	sb := old.Sandbox
	sb.Bridges = nil // DNS stays once it is there: processes remember the resolver
	for _, leg := range old.Sandbox.Bridges {
		if slices.ContainsFunc(slices.Collect(maps.Values(next.Networks)), func(s *network.EndpointSettings) bool { return s.NetworkID == leg.BridgeID }) {
			sb.Bridges = append(sb.Bridges, leg)
		}
	}
	for _, name := range sortedKeys(next.Networks) {
		if clusterID(next.Networks[name].NetworkID) {
			continue // see place
		}
		if slices.ContainsFunc(sb.Bridges, func(l overlay.BridgeLeg) bool { return l.BridgeID == next.Networks[name].NetworkID }) {
			continue
		}
		leg, s, err := e.bridgeLeg(*next, *next.Networks[name])
		if err != nil {
			return sb, err
		}
		sb.Bridges, next.Networks[name] = append(sb.Bridges, leg), s
	}
	for _, l := range sb.Bridges {
		sb.DNS = sb.DNS || len(l.Names) > 0
	}
	var held []overlay.HostPort
	for _, leg := range old.Sandbox.Bridges {
		held = append(held, leg.Ports...)
	}
	if err := e.publish(*next, &sb, held); err != nil {
		return sb, err
	}
	return sb, nil
}

// emitEndpoints tells that a container came to all of its networks of this node, or left them.
func (e *Engine) emitEndpoints(r record, action events.Action) {
	for _, name := range sortedKeys(r.Networks) {
		if l, err := e.nets.find(r.Networks[name].NetworkID); err == nil {
			e.emitEndpoint(l, r.ID, action)
		}
	}
}

func (e *Engine) emitEndpoint(l *localNetwork, containerID string, action events.Action) {
	e.events.publish(events.Message{Type: events.NetworkEventType, Action: action,
		Actor: events.Actor{ID: l.ID, Attributes: map[string]string{"name": l.Name, "type": l.Driver, "container": containerID}}})
}
