package dispatcher

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/swarm"
	"google.golang.org/protobuf/proto"

	"skein/manager/api"
	"skein/manager/store"
)

func errNodeRemoved(id string) error {
	return api.Errorf(errdefs.ErrPermissionDenied, "node %s was removed from the cluster", id)
}

// spread is what goes to many nodes: the endpoint tables, and who waits for what.
type spread struct {
	tables      map[string]*table
	nodes       map[uint32]*api.NodeEndpoint
	services    map[string]map[string]*api.ServiceEndpoint // service → table → record
	stopping    map[string]struct{}                        // tasks whose drain is not settled
	resubscribe map[*node]struct{}                         // nodes whose needed tables may have changed
	reassign    []*node                                    // nodes with changed assignments, in their turn
	ingress     string                                     // id of the ingress network, whose record goes with the mesh
}

func newSpread() *spread {
	s := &spread{
		tables: map[string]*table{}, nodes: map[uint32]*api.NodeEndpoint{}, services: map[string]map[string]*api.ServiceEndpoint{},
		stopping: map[string]struct{}{}, resubscribe: map[*node]struct{}{},
	}
	s.tables[api.MeshTable] = newTable(api.MeshTable)
	return s
}

// table is one endpoint table; changed holds the keys that differ from what was sent last.
type table struct {
	id        string
	version   uint64    // store version of its newest content
	at        time.Time // when this leader made that version
	network   *store.Network
	nodes     map[uint32]int // endpoints per node index (mesh: one for being a node)
	services  map[string]*api.ServiceEndpoint
	endpoints map[string]*api.TaskEndpoint
	draining  map[string]uint64 // endpoint → version since which it is out of rotation; 0: with the next one
	changed   tableChanges
	wide      bool              // the mesh: something is published, so that every node has to know all nodes
	sums      map[string]uint64 // of each record that was sent
	sum       uint64            // of them all: names the content
	encoded   []part            // the whole table; nil: not made since its last change
}

type tableChanges struct {
	any       bool
	network   bool
	nodes     map[uint32]struct{}
	services  map[string]struct{}
	endpoints map[string]struct{}
}

func newTableChanges() tableChanges {
	return tableChanges{nodes: map[uint32]struct{}{}, services: map[string]struct{}{}, endpoints: map[string]struct{}{}}
}

func newTable(id string) *table {
	return &table{
		id: id, nodes: map[uint32]int{}, services: map[string]*api.ServiceEndpoint{}, endpoints: map[string]*api.TaskEndpoint{},
		draining: map[string]uint64{}, changed: newTableChanges(), sums: map[string]uint64{},
	}
}

func (t *table) ref(index uint32, by int) {
	was := t.nodes[index]
	t.nodes[index] = was + by
	if t.nodes[index] <= 0 {
		delete(t.nodes, index)
	}
	if was == 0 || was+by <= 0 {
		t.changeNode(index)
	}
}

// changeNode notes that a node's record is to be sent anew, or taken back.
func (t *table) changeNode(index uint32) {
	if t.id == api.MeshTable && !t.wide {
		return // it lists no nodes
	}
	t.changed.any = true
	t.changed.nodes[index] = struct{}{}
}

// lists reports whether the table has a node's record.
func (t *table) lists(index uint32) bool {
	if t.id == api.MeshTable {
		return t.wide
	}
	return t.nodes[index] > 0
}

// widen has the mesh list all nodes as long as something is published.
func (s *spread) widen(t *table) {
	wide := len(t.services)+len(t.endpoints) > 0
	if t.id != api.MeshTable || t.wide == wide {
		return
	}
	t.wide = true
	for i := range s.nodes {
		t.changeNode(i)
	}
	t.wide = wide
}

func (s *spread) setNetwork(id string, rec *store.Network) {
	s.setIngress(id, rec)
	t := s.tables[id]
	if rec == nil {
		delete(s.tables, id)
		return
	}
	if t == nil {
		t = newTable(id)
		s.tables[id] = t
	}
	if !proto.Equal(t.network, rec) {
		t.network = rec
		t.changed.any, t.changed.network = true, true
	}
}

func (s *spread) setNode(rec *store.Node) {
	e := &api.NodeEndpoint{Index: rec.Index, NodeId: rec.Id, UnderlayAddr: rec.UnderlayAddr, Hostname: rec.Hostname, Addrs: rec.Addrs, Keys: rec.Crypt.GetKeys()}
	old := s.nodes[rec.Index]
	if proto.Equal(old, e) {
		return
	}
	s.nodes[rec.Index] = e
	if old == nil {
		s.tables[api.MeshTable].ref(rec.Index, +1)
	}
	for _, t := range s.tables {
		if t.nodes[rec.Index] > 0 {
			t.changeNode(rec.Index)
		}
	}
}

func (s *spread) removeNode(index uint32) {
	if s.nodes[index] == nil {
		return
	}
	s.tables[api.MeshTable].ref(index, -1)
	delete(s.nodes, index)
}

// setService brings a service's records in the tables up to date; it tells whether its tasks' endpoints have to be looked at.
func (s *spread) setService(id string, svc *store.Service) bool {
	old, now := s.services[id], serviceRecords(svc)
	for table := range old {
		if t := s.tables[table]; t != nil && now[table] == nil {
			delete(t.services, id)
			t.changed.any = true
			t.changed.services[id] = struct{}{}
		}
	}
	for table, rec := range now {
		if t := s.tables[table]; t != nil && !proto.Equal(t.services[id], rec) {
			t.services[id] = rec
			t.changed.any = true
			t.changed.services[id] = struct{}{}
		}
	}
	if len(now) == 0 {
		delete(s.services, id)
	} else {
		s.services[id] = now
	}
	return !maps.EqualFunc(old, now, func(a, b *api.ServiceEndpoint) bool { return proto.Equal(a, b) })
}

// serviceRecords are a service's records by table: names and VIP on each network, published ports on the mesh.
func serviceRecords(svc *store.Service) map[string]*api.ServiceEndpoint {
	out := map[string]*api.ServiceEndpoint{}
	if svc == nil {
		return out
	}
	dnsrr := svc.Spec.EndpointSpec != nil && svc.Spec.EndpointSpec.Mode == swarm.ResolutionModeDNSRR
	for _, n := range svc.Spec.TaskTemplate.Networks {
		out[n.Target] = &api.ServiceEndpoint{ServiceId: svc.Id, Name: svc.Name, Aliases: n.Aliases, Dnsrr: dnsrr, Ports: namedPorts(svc.Ports)}
	}
	for _, v := range svc.Vips {
		e := out[v.NetworkId]
		if e == nil {
			e = &api.ServiceEndpoint{ServiceId: svc.Id, Name: svc.Name, Dnsrr: dnsrr, Ports: namedPorts(svc.Ports)}
			out[v.NetworkId] = e
		}
		e.Vip4, e.Vip6 = v.Addr4, v.Addr6
	}
	if len(svc.Ports) > 0 {
		out[api.MeshTable] = &api.ServiceEndpoint{ServiceId: svc.Id, Name: svc.Name, Ports: svc.Ports}
	}
	return out
}

func (s *spread) setEndpoint(id string, e *api.TaskEndpoint) {
	t := s.tables[id]
	if t == nil {
		return
	}
	old := t.endpoints[e.TaskId]
	if proto.Equal(old, e) {
		return
	}
	t.ref(e.NodeIndex, +1)
	if old != nil {
		t.ref(old.NodeIndex, -1)
	}
	t.endpoints[e.TaskId] = e
	t.changed.any = true
	t.changed.endpoints[e.TaskId] = struct{}{}
	if e.State != stateDraining && e.State != stateLost {
		delete(t.draining, e.TaskId)
	} else if _, since := t.draining[e.TaskId]; !since {
		t.draining[e.TaskId] = 0
	}
}

func (s *spread) removeEndpoint(id, task string) {
	t := s.tables[id]
	if t == nil || t.endpoints[task] == nil {
		return
	}
	t.ref(t.endpoints[task].NodeIndex, -1)
	delete(t.endpoints, task)
	delete(t.draining, task)
	t.changed.any = true
	t.changed.endpoints[task] = struct{}{}
}

// States of an endpoint in a table.
const (
	stateStarting = "starting"
	stateReady    = "ready"
	stateDraining = "draining"
	stateLost     = "lost" // draining, on a node that is down
)

// leaving reports whether a task's node is about to end it though nobody asked for that: it gets no new clients then.
func leaving(t *store.Task) bool {
	return t.State == api.TaskRunning && t.Status.GetMessage() == api.MessageLeaving
}

// endpoint is a task as a table shows it.
func (d *Dispatcher) endpoint(tx store.ReadTx, t *store.Task, table string) *api.TaskEndpoint {
	n := d.nodes[t.NodeID]
	e := &api.TaskEndpoint{TaskId: t.ID, ServiceId: t.ServiceID, NodeIndex: n.rec.Index, State: stateStarting}
	switch {
	case n.rec.Status.GetState() == nodeDown:
		e.State = stateLost
	case leaving(t) || t.Desired >= api.TaskShutdown:
		e.State = stateDraining
	case t.State == api.TaskRunning:
		e.State = stateReady
	}
	if table == api.MeshTable {
		e.Addr4, e.Addr6 = plain(t.Gateway4), plain(t.Gateway6)
		e.HostPorts = t.HostPorts
		return e
	}
	svc := tx.Service(t.ServiceID)
	e.Names = taskNames(t, svc, n.rec)
	for _, a := range t.Attachments {
		if a.NetworkId != table {
			continue
		}
		e.Addr4, e.Addr6 = bare(a.Addr4), bare(a.Addr6)
		for _, alias := range a.Aliases {
			if svc == nil || !serviceAlias(svc, alias) {
				e.Names = append(e.Names, alias)
			}
		}
	}
	return e
}

// namedPorts are those that DNS answers for by name.
func namedPorts(ports []*api.PortConfig) []*api.PortConfig {
	return slices.DeleteFunc(slices.Clone(ports), func(p *api.PortConfig) bool { return p.Name == "" })
}

// taskNames are docker's names of a task's container: its own, its short id, its host name if the service chose one.
func taskNames(t *store.Task, svc *store.Service, node *store.Node) []string {
	var names []string
	if svc != nil {
		names = append(names, taskName(t, svc))
	}
	if id := t.Status.GetContainerId(); len(id) >= 12 {
		names = append(names, id[:12])
	}
	if svc == nil || svc.Revs[t.Revision] == nil {
		return names
	}
	if cs := svc.Revs[t.Revision].TaskTemplate.ContainerSpec; cs != nil && cs.Hostname != "" {
		if host := taskHostname(cs.Hostname, t, svc, node); host != "" && !slices.Contains(names, host) {
			names = append(names, host)
		}
	}
	return names
}

func taskName(t *store.Task, svc *store.Service) string {
	return svc.Name + "." + fmt.Sprint(taskSlot(t)) + "." + t.ID
}

func taskSlot(t *store.Task) any {
	if t.Slot == 0 {
		return t.NodeID
	}
	return t.Slot
}

// taskHostname expands the template as the task's node does; one that cannot be expanded ends the task there, and is no name.
func taskHostname(text string, t *store.Task, svc *store.Service, node *store.Node) string {
	if !strings.Contains(text, "{{") {
		return text
	}
	var desc swarm.NodeDescription
	if err := json.Unmarshal(node.DescriptionJson, &desc); err != nil { // its agent said nothing of itself yet
		return ""
	}
	type m = map[string]any
	host, err := api.ExpandTemplate(text, m{
		"Service": m{"ID": svc.Id, "Name": svc.Name},
		"Node":    m{"ID": t.NodeID, "Hostname": node.Hostname, "Platform": m{"Architecture": desc.Platform.Architecture, "OS": desc.Platform.OS}},
		"Task":    m{"ID": t.ID, "Slot": taskSlot(t), "Name": taskName(t, svc)},
	}, nil)
	if err != nil {
		return ""
	}
	return host
}

func serviceAlias(svc *store.Service, alias string) bool {
	if alias == svc.Name {
		return true
	}
	return slices.ContainsFunc(svc.Spec.TaskTemplate.Networks, func(n swarm.NetworkAttachmentConfig) bool { return slices.Contains(n.Aliases, alias) })
}
