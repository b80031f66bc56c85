package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/client"

	"skein/agent/dockerapi"
	"skein/cmd/dev"
	"skein/test/nemesis"
)

const (
	settle   = 60 * time.Second // for a first agreement, and the bound of all waits
	pollStep = 100 * time.Millisecond
	askings  = 12 // of a published port per node
)

// run breaks the cluster in each way and waits for the truth after it.
func run(ctx context.Context, o options) (int, error) {
	chosen, err := choose(o.faults)
	if err != nil {
		return 0, err
	}
	w, err := newWorld(ctx, o)
	if err != nil {
		return 0, err
	}
	if err = w.deploy(ctx); err == nil {
		_, err = w.agree(ctx, settle)
	}
	for range o.rounds {
		for _, f := range chosen {
			if err == nil && ctx.Err() == nil {
				err = w.round(ctx, o, f)
			}
		}
	}
	return w.broken, errors.Join(err, w.close())
}

// deploy makes a service with a VIP and a mesh port, one with neither, and one task on each node that looks names up.
func (w *world) deploy(ctx context.Context) error {
	if err := w.createNetwork(ctx, netName, client.NetworkCreateOptions{}); err != nil {
		return err
	}
	web := spec("web", w.image, 5, netName)
	web.EndpointSpec = &swarm.EndpointSpec{Ports: []swarm.PortConfig{{Protocol: "tcp", TargetPort: 8080, PublishedPort: webPort}}}
	rr := spec("rr", w.image, 3, netName)
	rr.EndpointSpec = &swarm.EndpointSpec{Mode: swarm.ResolutionModeDNSRR}
	probe := spec("probe", w.image, -1, netName)
	probe.EndpointSpec = &swarm.EndpointSpec{Ports: []swarm.PortConfig{{Protocol: "tcp", TargetPort: 8080, PublishedPort: probePort, PublishMode: swarm.PortConfigPublishModeHost}}}
	return errors.Join(w.createService(ctx, web), w.createService(ctx, rr), w.createService(ctx, probe))
}

// round makes one fault while services change, heals it and measures how long it is until all agrees.
func (w *world) round(ctx context.Context, o options, f fault) error {
	w.Say("--- %s", f.name)
	heal, err := f.begin(ctx, w)
	if err != nil {
		return err
	}
	hold := o.hold
	if f.brief {
		hold = 0
	}
	end := time.Now().Add(hold)
	for i := uint64(0); time.Now().Before(end) && ctx.Err() == nil; i++ { // tables change while somebody cannot hear of it
		c, cancel := context.WithDeadline(ctx, end)
		_ = errors.Join(w.scale(c, "web", 4+i%4), w.scale(c, "rr", 2+i%3))
		cancel()
		nemesis.Sleep(ctx, min(3*time.Second, time.Until(end)))
	}
	if err := heal(); err != nil {
		return err
	}
	took, err := w.agree(ctx, settle)
	if err != nil {
		w.violate("%s: %v after healing not all agrees: %v", f.name, settle, err)
		return nil
	}
	w.Say("%s: all agrees %.2f s after healing", f.name, took.Seconds())
	if took > o.within {
		w.violate("%s: it took longer than %v", f.name, o.within)
	}
	return nil
}

// agree waits until everything that nodes say is what the record says. took is to the begin of the first look that found it so.
func (w *world) agree(ctx context.Context, limit time.Duration) (took time.Duration, err error) {
	begun := time.Now()
	said := ""
	for ctx.Err() == nil {
		took = time.Since(begun)
		if err = w.disagreement(ctx); err == nil || took > limit {
			return took, err
		}
		if text, _, _ := strings.Cut(err.Error(), "\n"); text != said {
			said = text
			w.Say("  %.1f s: %s", took.Seconds(), said)
		}
		nemesis.Sleep(ctx, pollStep)
	}
	return took, ctx.Err()
}

// record is what the managers say.
type record struct {
	ready map[string][]string // service → addresses of its tasks on the network
	vips  map[string]string
}

// disagreement compares all that nodes say with the record.
func (w *world) disagreement(ctx context.Context) error {
	rec, err := w.record(ctx)
	if err != nil {
		return err
	}
	var status []dockerapi.NetStatusRow
	if err := ask(ctx, w.Managers()[0], "GET", "/skein/net/status", &status); err != nil {
		return err
	}
	seen := map[string]bool{}
	for _, r := range status {
		seen[r.Hostname] = true
		if !r.Live || r.Applied != r.Desired || r.Err != "" {
			return fmt.Errorf("table %s of %s: desired %d, applied %d, live %v: %s%s", r.Network, r.Hostname, r.Desired, r.Applied, r.Live, r.Reason, r.Err)
		}
	}
	if len(seen) != len(w.Nodes) {
		return fmt.Errorf("net status knows %d nodes of %d", len(seen), len(w.Nodes))
	}
	errs := make([]error, len(w.Nodes)+1)
	var wg sync.WaitGroup
	wg.Go(func() { errs[len(w.Nodes)] = w.kernels(ctx) })
	for i, n := range w.Nodes {
		wg.Go(func() { errs[i] = w.node(ctx, n, rec) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// record reads services and tasks; one whose tasks are not what is wanted is not settled.
func (w *world) record(ctx context.Context) (record, error) {
	rec := record{ready: map[string][]string{}, vips: map[string]string{}}
	var services []swarm.Service
	err := w.call(ctx, func(ctx context.Context, c *client.Client) error {
		r, err := c.ServiceList(ctx, client.ServiceListOptions{})
		services = r.Items
		return err
	})
	tasks, terr := w.tasks(ctx)
	if err = errors.Join(err, terr); err != nil {
		return rec, err
	}
	for _, s := range services {
		name, want := s.Spec.Name, len(w.Nodes)
		if s.Spec.Mode.Replicated != nil {
			want = int(*s.Spec.Mode.Replicated.Replicas)
		}
		for _, v := range s.Endpoint.VirtualIPs {
			if p, err := netip.ParsePrefix(v.Addr.String()); err == nil && name == "web" && p.IsValid() {
				rec.vips[v.NetworkID] = p.Addr().String()
			}
		}
		for _, t := range tasks {
			if t.ServiceID != s.ID || t.DesiredState != swarm.TaskStateRunning || t.Status.State != swarm.TaskStateRunning {
				continue
			}
			for _, a := range t.NetworksAttachments {
				if a.Network.Spec.Name == netName && len(a.Addresses) > 0 {
					rec.ready[name] = append(rec.ready[name], a.Addresses[0].Addr().String())
				}
			}
		}
		slices.Sort(rec.ready[name])
		if len(rec.ready[name]) != want {
			return rec, fmt.Errorf("%d tasks of %s run, want %d", len(rec.ready[name]), name, want)
		}
	}
	return rec, nil
}

// kernels asks a manager to have all kernels compared.
func (w *world) kernels(ctx context.Context) error {
	var list []dockerapi.NetCheckNode
	if err := ask(ctx, w.Nodes[0], "GET", "/skein/net/check", &list); err != nil {
		return err
	}
	if len(list) != len(w.Nodes) {
		return fmt.Errorf("net check knows %d nodes of %d", len(list), len(w.Nodes))
	}
	for _, n := range list {
		if n.Err != "" {
			return fmt.Errorf("net check of %s: %s", n.Hostname, n.Err)
		}
		for _, d := range n.Differences {
			return fmt.Errorf("net check of %s: %s: %s %s: %s", n.Hostname, d.Table, d.Kind, d.Object, d.State)
		}
	}
	return nil
}

// node compares what names and the published port lead to on one node.
func (w *world) node(ctx context.Context, n *dev.Node, rec record) error {
	resolve := func(name string) ([]string, error) {
		list, err := get(ctx, fmt.Sprintf("http://%s:%d/resolve?name=%s", n.Address, probePort, name), 2*time.Second)
		return slices.DeleteFunc(list, func(a string) bool { return strings.Contains(a, ":") }), err
	}
	for name, want := range map[string][]string{"tasks.web": rec.ready["web"], "tasks.rr": rec.ready["rr"], "rr": rec.ready["rr"], "tasks.probe": rec.ready["probe"]} {
		got, err := resolve(name)
		if err != nil {
			return fmt.Errorf("%s: %w", n.Name, err)
		}
		if !slices.Equal(got, want) {
			return fmt.Errorf("%s: %s is %v, want %v", n.Name, name, got, want)
		}
	}
	if got, err := resolve("web"); err != nil || len(got) != 1 || !slices.Contains(slices.Collect(maps.Values(rec.vips)), got[0]) {
		return fmt.Errorf("%s: web is %v (%v), want one of %v", n.Name, got, err, rec.vips)
	}
	for range askings {
		if _, err := get(ctx, fmt.Sprintf("http://%s:%d/", n.Address, webPort), time.Second); err != nil {
			return fmt.Errorf("%s: published port: %w", n.Name, err)
		}
	}
	return nil
}
