package engine

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"sync"
	"time"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/network"
	"google.golang.org/protobuf/proto"

	"skein/agent"
	"skein/manager/api"
	"skein/overlay"
)

// Containers that are no tasks on networks of the cluster. Their addresses are the managers' to give. What a container wishes follows from its
// record, and is told to the managers before it starts and whenever it changes; whatever gets lost on the way, the keeper tells again.

const (
	addressWait    = 20 * time.Second // for addresses: an election is over by then
	tableWait      = 15 * time.Second // for the tables that have them
	attachEvery    = time.Minute      // the whole set is told again
	attachRetryMin = 500 * time.Millisecond
	attachRetryMax = 30 * time.Second

	clusterIDLength = 25
)

// Cluster is what the engine needs of the cluster that this node is part of. Without one, its methods return unavailable errors.
type Cluster interface {
	// NodeNetwork is the network of the cluster that a name, id or unique id prefix means.
	NodeNetwork(ctx context.Context, ref string) (network.Inspect, error)
	// Attach sets and removes what containers of this node hold of the networks. Repeating it changes nothing.
	Attach(ctx context.Context, r *api.AttachRequest) (*api.AttachReply, error)
	// AwaitNetworks returns when this node's tables have the container as an endpoint of the networks.
	AwaitNetworks(ctx context.Context, container string, networks []string, gateway bool) error
	// Member reports whether this node is part of a cluster.
	Member() bool
}

// attachments is what the managers were told of this node's containers.
type attachments struct {
	cluster Cluster       // nil: none
	poke    chan struct{} // capacity 1
	// order is held by the keeper while it tells something, and shared by starts: what the keeper says is never older than what they said.
	order sync.RWMutex

	mu      sync.Mutex
	pending map[string]*api.AttachmentWish // of containers that are being started or changed, by id
	sent    map[string]*api.AttachmentWish // what the managers agreed to last
	full    bool                           // what they know is not known here
	tables  agent.Tables                   // newest
}

func newAttachments() *attachments {
	return &attachments{poke: make(chan struct{}, 1), pending: map[string]*api.AttachmentWish{}, sent: map[string]*api.AttachmentWish{}, full: true}
}

// SetCluster tells the engine of whom to ask for addresses on the cluster's networks. It comes before Run.
func (e *Engine) SetCluster(c Cluster) { e.attach.cluster = c }

// SyncAttachments has the managers told the whole set: a session began, they may know something else.
func (e *Engine) SyncAttachments() {
	e.attach.mu.Lock()
	e.attach.full = true
	e.attach.mu.Unlock()
	e.attachmentsChanged()
}

// attachmentsChanged has the keeper look.
func (e *Engine) attachmentsChanged() {
	select {
	case e.attach.poke <- struct{}{}:
	default:
	}
}

// clusterID tells ids of the cluster's networks from those of this node's, which are longer.
func clusterID(network string) bool { return len(network) == clusterIDLength }

// onCluster lists the names of a container's networks that are the cluster's, in the order of its devices: that of its mode first.
func onCluster(r record) []string {
	names := slices.DeleteFunc(sortedKeys(r.Networks), func(name string) bool { return !clusterID(r.Networks[name].NetworkID) })
	mode := string(r.HostConfig.NetworkMode)
	if i := slices.IndexFunc(names, func(n string) bool { return n == mode || r.Networks[n].NetworkID == mode }); i > 0 {
		first := names[i]
		names = slices.Insert(slices.Delete(names, i, i+1), 0, first)
	}
	return names
}

// wish is what a container that is no task is to hold of the cluster's networks.
func (e *Engine) wish(r record, active bool) *api.AttachmentWish {
	w := &api.AttachmentWish{Id: r.ID, Name: r.Name, Active: active, Gateway: true}
	for _, s := range r.Networks {
		if clusterID(s.NetworkID) {
			continue
		}
		if l, err := e.nets.find(s.NetworkID); err == nil && l.Driver != driverNull && !l.Internal {
			w.Gateway = false // that network is its way out
		}
	}
	for _, name := range onCluster(r) {
		s := r.Networks[name]
		n := &api.AttachedNetwork{NetworkId: s.NetworkID, Names: dnsNames(r, s.Aliases)}
		if c := s.IPAMConfig; c != nil && c.IPv4Address.IsValid() {
			n.Addr4 = c.IPv4Address.String()
		}
		if c := s.IPAMConfig; c != nil && c.IPv6Address.IsValid() {
			n.Addr6 = c.IPv6Address.String()
		}
		w.Networks = append(w.Networks, n)
	}
	return w
}

// place asks for what next is to hold of the cluster's networks, waits until they are ready here, and completes sandbox and settings. The caller
// records them and then calls settled, also after an error.
func (e *Engine) place(ctx context.Context, next record, sb *overlay.Sandbox, nets map[string]*network.EndpointSettings) error {
	w, before := e.wish(next, true), *sb
	sb.Legs, sb.Gateway4, sb.Gateway6 = nil, netip.Addr{}, netip.Addr{}
	if len(w.Networks) == 0 {
		return nil
	}
	rec, err := e.askFor(ctx, w)
	if err != nil && cerrdefs.IsUnavailable(err) {
		rec, err = stays(w, before, err) // leaving a network needs nobody's consent
	}
	if err != nil {
		return err
	}
	if err := e.fill(next, rec, sb, nets); err != nil {
		return err
	}
	return e.publishByBridge(ctx, next, sb)
}

// fill puts what the managers gave into a sandbox and its settings.
func (e *Engine) fill(next record, rec *api.AttachmentRecord, sb *overlay.Sandbox, nets map[string]*network.EndpointSettings) error {
	sb.DNS, sb.Legs = true, nil
	for _, name := range onCluster(next) {
		s := *next.Networks[name]
		i := slices.IndexFunc(rec.Networks, func(n *api.AttachedNetwork) bool { return n.NetworkId == s.NetworkID })
		if i < 0 {
			return fmt.Errorf("network %s: the managers gave no address", name)
		}
		leg, err := attachedLeg(rec.Networks[i])
		if err != nil {
			return fmt.Errorf("network %s: %w", name, err)
		}
		sb.Legs = append(sb.Legs, leg)
		s.EndpointID, s.DNSNames, s.MacAddress = next.ID, rec.Networks[i].Names, network.HardwareAddr(overlay.StationOfLeg(leg))
		s.IPAddress, s.IPPrefixLen = leg.Addr4.Addr(), leg.Addr4.Bits()
		if leg.Addr6.IsValid() {
			s.GlobalIPv6Address, s.GlobalIPv6PrefixLen = leg.Addr6.Addr(), leg.Addr6.Bits()
		}
		nets[name] = &s
	}
	if !e.onGatewayBridge(*sb) {
		sb.Gateway4, sb.Gateway6 = addr(rec.Gateway4), addr(rec.Gateway6)
	}
	return nil
}

// stays is what a running container holds of a wish that asks for nothing more; unavailable is why the managers did not say so. They are told later.
func stays(w *api.AttachmentWish, sb overlay.Sandbox, unavailable error) (*api.AttachmentRecord, error) {
	rec := &api.AttachmentRecord{Id: w.Id}
	for _, n := range w.Networks {
		i := slices.IndexFunc(sb.Legs, func(l overlay.Leg) bool { return l.NetworkID == n.NetworkId })
		if i < 0 {
			return nil, unavailable
		}
		got := &api.AttachedNetwork{NetworkId: n.NetworkId, Addr4: sb.Legs[i].Addr4.String(), Names: n.Names}
		if sb.Legs[i].Addr6.IsValid() {
			got.Addr6 = sb.Legs[i].Addr6.String()
		}
		rec.Networks = append(rec.Networks, got)
	}
	if w.Gateway && sb.Gateway4.IsValid() {
		rec.Gateway4 = sb.Gateway4.String()
		if sb.Gateway6.IsValid() {
			rec.Gateway6 = sb.Gateway6.String()
		}
	}
	return rec, nil
}

// follow makes a running container agree with what the managers say that it holds: a network may have become internal to it, or all it held was
// lost with the node's removal and given anew.
func (e *Engine) follow(ctx context.Context, c *entry, rec *api.AttachmentRecord) error {
	if err := c.lock(); err != nil {
		return nil
	}
	defer c.op.Unlock()
	old := c.snapshot()
	w := e.wish(old, true)
	if !old.State.active() || len(w.Networks) != len(rec.Networks) {
		return nil // it changed since then, and the managers will be told
	}
	next := old
	next.Networks = maps.Clone(old.Networks)
	if err := e.fill(old, rec, &next.Sandbox, next.Networks); err != nil {
		return nil // likewise
	}
	if reflect.DeepEqual(next.Sandbox, old.Sandbox) {
		return nil
	}
	if err := e.await(ctx, rec); err != nil {
		return err
	}
	if err := e.update(c, func(r *record) { r.Sandbox, r.Networks = next.Sandbox, next.Networks }); err != nil {
		return err
	}
	if _, err := e.cfg.Network.AddSandbox(ctx, next.Sandbox); err != nil {
		return err
	}
	return e.refreshNetworkFiles(old, next)
}

func attachedLeg(n *api.AttachedNetwork) (overlay.Leg, error) {
	leg := overlay.Leg{NetworkID: n.NetworkId}
	var err error
	if leg.Addr4, err = netip.ParsePrefix(n.Addr4); err != nil {
		return leg, fmt.Errorf("address %q: %w", n.Addr4, err)
	}
	if n.Addr6 != "" {
		if leg.Addr6, err = netip.ParsePrefix(n.Addr6); err != nil {
			return leg, fmt.Errorf("address %q: %w", n.Addr6, err)
		}
	}
	return leg, nil
}

// askFor gets a wish met by the managers and waits for the tables.
func (e *Engine) askFor(ctx context.Context, w *api.AttachmentWish) (*api.AttachmentRecord, error) {
	c := e.attach.cluster
	if c == nil || !c.Member() {
		return nil, notFound("network %s not found: this node is not part of a cluster any more", w.Networks[0].NetworkId)
	}
	e.attach.mu.Lock()
	e.attach.pending[w.Id] = w
	e.attach.mu.Unlock()
	e.attach.order.RLock()
	bounded, cancel := context.WithTimeout(ctx, addressWait)
	defer cancel()
	reply, err := c.Attach(bounded, &api.AttachRequest{Set: []*api.AttachmentWish{w}})
	if err == nil && len(reply.Attachments) != 1 {
		err = fmt.Errorf("attach container %s: the managers' answer lacks it", w.Name)
	}
	e.attach.mu.Lock()
	if err == nil {
		e.attach.sent[w.Id] = w
	} else {
		e.attach.full = true // it may have been done all the same
	}
	e.attach.mu.Unlock()
	e.attach.order.RUnlock()
	if err != nil {
		return nil, err
	}
	return reply.Attachments[0], e.await(ctx, reply.Attachments[0])
}

// await returns when this node's network is ready for a container.
func (e *Engine) await(ctx context.Context, rec *api.AttachmentRecord) error {
	var ids []string
	for _, n := range rec.Networks {
		ids = append(ids, n.NetworkId)
	}
	ctx, cancel := context.WithTimeout(ctx, tableWait)
	defer cancel()
	return e.attach.cluster.AwaitNetworks(ctx, rec.Id, ids, rec.Gateway4 != "")
}

// settled ends what place began: from here on the container's record says what it wishes.
func (e *Engine) settled(id string) {
	e.attach.mu.Lock()
	delete(e.attach.pending, id)
	e.attach.mu.Unlock()
	e.attachmentsChanged()
}

// keepAttachments tells the managers what changed, and now and then everything, until ctx ends.
func (e *Engine) keepAttachments(ctx context.Context) error {
	whole := time.NewTicker(attachEvery)
	defer whole.Stop()
	again := time.NewTimer(time.Hour)
	defer again.Stop()
	delay := attachRetryMin
	e.attachmentsChanged() // what an earlier daemon left untold
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-e.attach.poke:
		case <-again.C:
		case <-whole.C:
			e.attach.mu.Lock()
			e.attach.full = e.attach.full || len(e.attach.sent) > 0
			e.attach.mu.Unlock()
		}
		again.Stop()
		if err := e.tellAttachments(ctx); err != nil {
			if delay == attachRetryMin && ctx.Err() == nil {
				e.log.Warn("the managers do not know yet what containers here are on their networks", "err", err)
			}
			again.Reset(delay)
			delay = min(2*delay, attachRetryMax)
			continue
		}
		delay = attachRetryMin
	}
}

// tellAttachments makes what the managers know agree with the records.
func (e *Engine) tellAttachments(ctx context.Context) error {
	a := e.attach
	if a.cluster == nil {
		return nil
	}
	a.order.Lock()
	defer a.order.Unlock()
	if !a.cluster.Member() {
		a.mu.Lock()
		clear(a.sent)
		a.full = true
		a.mu.Unlock()
		return nil
	}
	r, want := e.attachRequest()
	if !r.Full && len(r.Set)+len(r.Removed) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, addressWait)
	defer cancel()
	reply, err := a.cluster.Attach(ctx, r)
	a.mu.Lock()
	defer a.mu.Unlock()
	if err != nil {
		a.full = true
		return err
	}
	if r.Full {
		clear(a.sent)
		a.full = false
	}
	for _, id := range r.Removed {
		delete(a.sent, id)
	}
	for _, rec := range reply.Attachments {
		a.sent[rec.Id] = want[rec.Id]
		if c := e.byID(rec.Id); c != nil && rec.Active {
			e.work.Go(func() error {
				if err := e.follow(e.background, c, rec); err != nil {
					e.log.Error("give a running container the addresses that it has now", "container", rec.Name, "err", err)
				}
				return nil
			})
		}
	}
	for _, w := range r.Set {
		if a.sent[w.Id] != w && w.Active {
			e.log.Error("a container lost its place on the cluster's networks: start it anew", "container", w.Name)
		}
	}
	return nil
}

// attachRequest is what there is to tell, and all wishes by container.
func (e *Engine) attachRequest() (*api.AttachRequest, map[string]*api.AttachmentWish) {
	a := e.attach
	a.mu.Lock()
	pending := maps.Clone(a.pending) // before the records are read: one that is settled meanwhile is in its record
	a.mu.Unlock()
	want := map[string]*api.AttachmentWish{}
	for _, c := range e.all() {
		if r := c.snapshot(); r.Attached && r.Task == "" {
			if w := e.wish(r, !r.State.Clean); len(w.Networks) > 0 {
				want[r.ID] = w
			}
		}
	}
	maps.Copy(want, pending)
	a.mu.Lock()
	defer a.mu.Unlock()
	r := &api.AttachRequest{Full: a.full}
	for _, id := range sortedKeys(want) {
		if r.Full || !proto.Equal(want[id], a.sent[id]) {
			r.Set = append(r.Set, want[id])
		}
	}
	for _, id := range sortedKeys(a.sent) {
		if want[id] == nil {
			r.Removed = append(r.Removed, id)
		}
	}
	return r, want
}
