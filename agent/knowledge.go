package agent

import (
	"fmt"
	"maps"
	"slices"

	"google.golang.org/protobuf/proto"

	"skein/manager/api"
)

// knowledge is everything the managers told this node, merged. It is plain data: no clock, no I/O; its owner locks.
type knowledge struct {
	welcome     *api.Welcome
	managers    []*api.ManagerPeer
	sequence    uint64
	assignments map[string]*api.Assignment // each complete
	networks    map[string]*api.NetworkRecord
	templates   map[templateKey]*template
	incoming    *incoming                  // a full set of which parts are still to come
	merged      []*api.Assignment          // those of the last update, complete
	reports     map[string]*api.TaskReport // those that a restart must not forget
	// Secrets and configs that assignments refer to. In memory only: they are not written to the node's disk, and told anew in each session.
	dependencies map[string]*api.DependencyRecord
	tabs         map[string]*table
	coming       map[string]*table // full tables of which parts are still to come
}

// templateKey names a revision of a service.
type templateKey struct {
	service  string
	revision uint64
}

// template is what tasks of one revision have in common, and how many tasks here are made of it: it is dropped with the last.
type template struct {
	*api.Template
	uses int
}

// incoming is a full set that is being received.
type incoming struct {
	assignments map[string]*api.Assignment
	networks    map[string]*api.NetworkRecord
	templates   map[templateKey]*template
}

// table is one endpoint table being merged; handed is the copy given out last, valid until the next change.
type table struct {
	Table
	handed *Table
	digest uint64 // the managers' name for the content; 0: none
	parts  uint32 // received of a full table that is still incomplete
}

func newKnowledge() *knowledge {
	return &knowledge{
		assignments: map[string]*api.Assignment{}, networks: map[string]*api.NetworkRecord{},
		templates: map[templateKey]*template{}, reports: map[string]*api.TaskReport{}, dependencies: map[string]*api.DependencyRecord{},
		tabs: map[string]*table{}, coming: map[string]*table{},
	}
}

// merge takes one message. An error means that something before it was missed: the session must start anew.
func (k *knowledge) merge(m *api.ManagerMessage) error {
	switch x := m.Kind.(type) {
	case *api.ManagerMessage_Welcome:
		k.welcome = x.Welcome
	case *api.ManagerMessage_Managers:
		k.managers = x.Managers.Managers
	case *api.ManagerMessage_Assignments:
		return k.mergeAssignments(x.Assignments)
	case *api.ManagerMessage_Dependencies:
		for _, d := range x.Dependencies.Set {
			k.dependencies[d.Id] = d
		}
	case *api.ManagerMessage_Table:
		return k.mergeTable(x.Table)
	}
	return nil
}

func (k *knowledge) mergeAssignments(u *api.AssignmentUpdate) error {
	k.merged = nil
	if u.Full && u.Sequence <= 1 {
		k.incoming = &incoming{assignments: map[string]*api.Assignment{}, networks: map[string]*api.NetworkRecord{}, templates: map[templateKey]*template{}}
	} else if u.Sequence != k.sequence+1 && !(u.Full && k.incoming == nil) {
		return fmt.Errorf("assignment update %d follows %d: updates were lost", u.Sequence, k.sequence)
	}
	k.sequence = u.Sequence
	if u.Full {
		return k.mergeFull(u)
	}
	if k.incoming != nil {
		k.incoming = nil
		return fmt.Errorf("assignment update %d came before the full set was complete", u.Sequence)
	}
	learn(k.templates, u.Templates)
	for _, n := range u.Networks {
		k.networks[n.Id] = n
	}
	for _, a := range u.Set {
		old := k.assignments[a.TaskId]
		c, err := complete(a, old, k.templates)
		if err != nil {
			return err
		}
		if a.Templated && !old.GetTemplated() {
			k.templates[keyOf(a)].uses++
		}
		k.assignments[a.TaskId] = c
		k.merged = append(k.merged, c)
	}
	for _, id := range u.Removed {
		k.release(k.assignments[id])
		delete(k.assignments, id)
		delete(k.reports, id)
	}
	if len(u.Removed) > 0 {
		k.forgetDependencies()
	}
	return nil
}

// mergeFull takes a part of a full set; with the last one it replaces what was known.
func (k *knowledge) mergeFull(u *api.AssignmentUpdate) error {
	in := k.incoming
	if in == nil { // the journal of a node whose full set was one frame with a later number
		in = &incoming{assignments: map[string]*api.Assignment{}, networks: map[string]*api.NetworkRecord{}, templates: map[templateKey]*template{}}
		k.incoming = in
	}
	learn(in.templates, u.Templates)
	for _, n := range u.Networks {
		in.networks[n.Id] = n
	}
	for _, a := range u.Set {
		c, err := complete(a, k.assignments[a.TaskId], in.templates)
		if err != nil {
			return err
		}
		if a.Templated {
			in.templates[keyOf(a)].uses++
		} else if c.Templated {
			c.Templated = false // in this session it is not
		}
		in.assignments[a.TaskId] = c
	}
	if u.More {
		return nil
	}
	k.incoming = nil
	if u.Total != 0 && int(u.Total) != len(in.assignments) {
		return fmt.Errorf("the full set has %d tasks, %d were announced: updates were lost", len(in.assignments), u.Total)
	}
	k.assignments, k.networks, k.templates = in.assignments, in.networks, in.templates
	for _, a := range k.assignments {
		k.merged = append(k.merged, a)
	}
	maps.DeleteFunc(k.reports, func(id string, _ *api.TaskReport) bool { return k.assignments[id] == nil })
	k.forgetDependencies()
	return nil
}

func keyOf(a *api.Assignment) templateKey { return templateKey{a.ServiceId, a.Revision} }

func learn(known map[templateKey]*template, sent []*api.Template) {
	for _, t := range sent {
		key := templateKey{t.ServiceId, t.Revision}
		if known[key] == nil {
			known[key] = &template{Template: t}
		}
	}
}

// release notes that a task is gone, and with the last one of its template that, as the managers do.
func (k *knowledge) release(a *api.Assignment) {
	if !a.GetTemplated() {
		return
	}
	if t := k.templates[keyOf(a)]; t != nil {
		if t.uses--; t.uses <= 0 {
			delete(k.templates, keyOf(a))
		}
	}
}

// forgetDependencies drops secrets and configs that no assignment refers to.
func (k *knowledge) forgetDependencies() {
	if len(k.dependencies) == 0 {
		return
	}
	needed := map[string]bool{}
	for _, a := range k.assignments {
		for _, id := range a.Dependencies {
			needed[id] = true
		}
	}
	maps.DeleteFunc(k.dependencies, func(id string, _ *api.DependencyRecord) bool { return !needed[id] })
}

// complete adds to an assignment what its template says, or keeps what managers leave out for an ended task or a removed service. What it
// adds is shared.
func complete(a, old *api.Assignment, templates map[templateKey]*template) (*api.Assignment, error) {
	if a.Templated {
		t := templates[keyOf(a)]
		if t == nil {
			return nil, fmt.Errorf("task %s came before the template of revision %d of its service: updates were lost", a.TaskId, a.Revision)
		}
		c := proto.CloneOf(a)
		c.ServiceName, c.SpecJson, c.ServiceLabelsJson, c.Ports, c.Dependencies = t.ServiceName, t.SpecJson, t.ServiceLabelsJson, t.Ports, t.Dependencies
		return c, nil
	}
	if len(a.SpecJson) > 0 || old == nil || len(old.SpecJson) == 0 {
		return a, nil
	}
	c := proto.CloneOf(old)
	c.Desired, c.State, c.Drained, c.StartAfter = a.Desired, a.State, a.Drained, a.StartAfter
	return c, nil
}

func (k *knowledge) mergeTable(u *api.TableUpdate) error {
	if u.Gone {
		delete(k.tabs, u.Table)
		delete(k.coming, u.Table)
		return nil
	}
	t := k.tabs[u.Table]
	switch {
	case u.Same:
		if t == nil || t.digest != u.Digest {
			delete(k.tabs, u.Table)
			return fmt.Errorf("table %s is not the one that the managers mean", u.Table)
		}
		t.handed, t.Version = nil, u.Version
		return nil
	case u.Full && u.Part == 0:
		t = &table{Table: Table{Nodes: map[uint32]*api.NodeEndpoint{}, Services: map[string]*api.ServiceEndpoint{}, Endpoints: map[string]*api.TaskEndpoint{}}}
		k.coming[u.Table] = t
	case u.Full:
		if t = k.coming[u.Table]; t == nil || u.Part != t.parts {
			return fmt.Errorf("part %d of table %s does not follow the one before: updates were lost", u.Part, u.Table)
		}
	case k.coming[u.Table] != nil:
		return fmt.Errorf("change of table %s to version %d came before all of its content", u.Table, u.Version)
	}
	if t == nil {
		return fmt.Errorf("change of table %s to version %d came before its content", u.Table, u.Version)
	}
	t.handed = nil
	t.Version, t.digest = u.Version, u.Digest
	if u.Full {
		t.parts++
	}
	if u.Network != nil {
		t.Network = u.Network
	}
	for _, i := range u.RemovedNodes {
		delete(t.Nodes, i)
	}
	for _, n := range u.Nodes {
		t.Nodes[n.Index] = n
	}
	for _, id := range u.RemovedServices {
		delete(t.Services, id)
	}
	for _, s := range u.Services {
		t.Services[s.ServiceId] = s
	}
	for _, id := range u.RemovedEndpoints {
		delete(t.Endpoints, id)
	}
	for _, e := range u.Endpoints {
		t.Endpoints[e.TaskId] = e
	}
	if u.Full && !u.More {
		delete(k.coming, u.Table)
		k.tabs[u.Table] = t
	}
	return nil
}

// digests name the tables that this node holds, so that the next session need not bring what is here.
func (k *knowledge) digests() []*api.TableDigest {
	var out []*api.TableDigest
	for id, t := range k.tabs {
		if t.digest != 0 {
			out = append(out, &api.TableDigest{Table: id, Digest: t.digest})
		}
	}
	return out
}

// hand returns an immutable copy, the same one while nothing changes.
func (t *table) hand() Table {
	if t.handed == nil {
		t.handed = &Table{Version: t.Version, Network: t.Network, Nodes: maps.Clone(t.Nodes), Services: maps.Clone(t.Services), Endpoints: maps.Clone(t.Endpoints)}
	}
	return *t.handed
}

// tables returns what the network must become; false before the managers said who this node is.
func (k *knowledge) tables() (Tables, bool) {
	if k.welcome == nil || k.tabs[api.MeshTable] == nil {
		return Tables{}, false
	}
	t := Tables{NodeIndex: k.welcome.NodeIndex, DataPort: k.welcome.DataPort, MeshPool: k.welcome.MeshPool,
		MeshPool6: k.welcome.MeshPool6, Networks: map[string]Table{}}
	for id, tab := range k.tabs {
		if id == api.MeshTable {
			t.Mesh = k.withSelf(tab.hand())
			continue
		}
		t.Networks[id] = tab.hand()
	}
	return t, true
}

// withSelf adds this node to the mesh: while nothing is published, the managers do not list the nodes.
func (k *knowledge) withSelf(t Table) Table {
	n := k.welcome.Node
	if n == nil || t.Nodes[k.welcome.NodeIndex] != nil {
		return t
	}
	t.Nodes = maps.Clone(t.Nodes)
	t.Nodes[k.welcome.NodeIndex] = &api.NodeEndpoint{Index: k.welcome.NodeIndex, NodeId: n.Id, UnderlayAddr: n.UnderlayAddr, Hostname: n.Hostname}
	return t
}

func (k *knowledge) assigned() ([]*api.Assignment, []*api.NetworkRecord) {
	return slices.Collect(maps.Values(k.assignments)), slices.Collect(maps.Values(k.networks))
}

// frames is the knowledge as the shortest journal that leads to it.
func (k *knowledge) frames() []frame {
	var out []frame
	say := func(m *api.ManagerMessage) { out = append(out, frame{kind: frameManager, msg: m}) }
	if k.welcome != nil {
		say(&api.ManagerMessage{Kind: &api.ManagerMessage_Welcome{Welcome: k.welcome}})
	}
	if len(k.managers) > 0 {
		say(&api.ManagerMessage{Kind: &api.ManagerMessage_Managers{Managers: &api.ManagerList{Managers: k.managers}}})
	}
	set, networks := k.assigned()
	full := &api.AssignmentUpdate{Sequence: k.sequence, Full: true, Networks: networks}
	for _, t := range k.templates {
		full.Templates = append(full.Templates, t.Template)
	}
	for _, a := range set {
		if a.Templated && k.templates[keyOf(a)] != nil {
			a = proto.CloneOf(a)
			a.ServiceName, a.SpecJson, a.ServiceLabelsJson, a.Ports, a.Dependencies = "", nil, nil, nil, nil
		}
		full.Set = append(full.Set, a)
	}
	say(&api.ManagerMessage{Kind: &api.ManagerMessage_Assignments{Assignments: full}})
	if len(k.reports) > 0 {
		out = append(out, frame{kind: frameReports, msg: &api.StatusBatch{Reports: slices.Collect(maps.Values(k.reports))}})
	}
	for id, t := range k.tabs {
		say(&api.ManagerMessage{Kind: &api.ManagerMessage_Table{Table: &api.TableUpdate{
			Table: id, Version: t.Version, Digest: t.digest, Full: true, Network: t.Network, Nodes: slices.Collect(maps.Values(t.Nodes)),
			Services: slices.Collect(maps.Values(t.Services)), Endpoints: slices.Collect(maps.Values(t.Endpoints)),
		}}})
	}
	return out
}
