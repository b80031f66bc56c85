package engine

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strings"

	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/network"
)

// connectCluster attaches a container, running or not, to a network of the cluster. It reports whether the reference means one.
func (e *Engine) connectCluster(ctx context.Context, ref string, req network.ConnectRequest) (bool, error) {
	n, err := e.clusterNetwork(ctx, ref)
	if n == nil || err != nil {
		return err != nil, err
	}
	c, err := e.find(req.Container)
	if err != nil {
		return true, err
	}
	if err := c.lock(); err != nil {
		return true, err
	}
	defer c.op.Unlock()
	wish := req.EndpointConfig
	if wish == nil {
		wish = &network.EndpointSettings{}
	}
	l := &localNetwork{ID: n.ID, Name: n.Name, Driver: driverOverlay}
	r := c.snapshot()
	if err := changeable(r, l); err != nil {
		return true, err
	}
	if _, ok := r.Networks[n.Name]; ok {
		return true, errf(errDenied, "endpoint with name %s already exists in network %s", r.Name, n.Name)
	}
	s, err := attachSettings(n, wish)
	if err != nil {
		return true, err
	}
	nets := maps.Clone(r.Networks)
	if nets == nil {
		nets = map[string]*network.EndpointSettings{}
	}
	delete(nets, network.NetworkNone) // the mode of a container that had no network
	nets[n.Name] = s
	if err := e.rewire(ctx, c, nets); err != nil {
		return true, err
	}
	e.emitEndpoint(l, r.ID, events.ActionConnect)
	return true, nil
}

// disconnectCluster takes a container off a network of the cluster. What the network is follows from the container's record: the managers need
// not answer, and the network may be gone.
func (e *Engine) disconnectCluster(ctx context.Context, ref string, req network.DisconnectRequest) (bool, error) {
	c, err := e.find(req.Container)
	if err != nil {
		n, _ := e.clusterNetwork(ctx, ref)
		return n != nil, err
	}
	name := clusterName(c.snapshot(), ref)
	if name == "" {
		n, err := e.clusterNetwork(ctx, ref)
		if n != nil {
			err = errf(errDenied, "container %s is not connected to network %s", c.snapshot().ID, n.Name)
		}
		return err != nil, err
	}
	if err := c.lock(); err != nil {
		return true, err
	}
	defer c.op.Unlock()
	r := c.snapshot()
	s := r.Networks[name]
	if s == nil {
		return true, errf(errDenied, "container %s is not connected to network %s", r.ID, name)
	}
	l := &localNetwork{ID: s.NetworkID, Name: name, Driver: driverOverlay}
	if err := changeable(r, l); err != nil {
		return true, err
	}
	nets := maps.Clone(r.Networks)
	delete(nets, name)
	if err := e.rewire(ctx, c, nets); err != nil {
		return true, err
	}
	e.emitEndpoint(l, r.ID, events.ActionDisconnect)
	return true, nil
}

const driverOverlay = "overlay"

// clusterName is the name of the container's network of the cluster that a reference means: its name, id, or the beginning of its id.
func clusterName(r record, ref string) string {
	for _, name := range onCluster(r) {
		if name == ref || ref != "" && strings.HasPrefix(r.Networks[name].NetworkID, ref) {
			return name
		}
	}
	return ""
}

// LeaveNetworks takes the running containers that are no tasks off the cluster's networks, for the node leaves the cluster. Stopped ones keep the
// wish: their start says what is missing.
func (e *Engine) LeaveNetworks(ctx context.Context) error {
	var errs []error
	for _, c := range e.all() {
		if r := c.snapshot(); r.Task == "" && r.State.active() && len(onCluster(r)) > 0 {
			errs = append(errs, e.leaveNetworks(ctx, c))
		}
	}
	return errors.Join(errs...)
}

func (e *Engine) leaveNetworks(ctx context.Context, c *entry) error {
	if err := c.lock(); err != nil {
		return nil // removed meanwhile
	}
	defer c.op.Unlock()
	r := c.snapshot()
	nets := maps.Clone(r.Networks)
	for _, name := range onCluster(r) {
		delete(nets, name)
	}
	if err := e.rewire(ctx, c, nets); err != nil {
		return fmt.Errorf("take container %s off the cluster's networks: %w", r.Name, err)
	}
	return nil
}
