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
	assignments map[string]*api.Assignment
	networks    map[string]*api.NetworkRecord
	reports     map[string]*api.TaskReport // those that a restart must not forget
	// Secrets and configs that assignments refer to. In memory only: they are not written to the node's disk, and told anew in each session.
	dependencies map[string]*api.DependencyRecord
	tabs         map[string]*table
}

// table is one endpoint table being merged; handed is the copy given out last, valid until the next change.
type table struct {
	Table
	handed *Table
}

func newKnowledge() *knowledge {
	return &knowledge{
		assignments: map[string]*api.Assignment{}, networks: map[string]*api.NetworkRecord{},
		reports: map[string]*api.TaskReport{}, dependencies: map[string]*api.DependencyRecord{}, tabs: map[string]*table{},
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
	if !u.Full && u.Sequence != k.sequence+1 {
		return fmt.Errorf("assignment update %d follows %d: updates were lost", u.Sequence, k.sequence)
	}
	k.sequence = u.Sequence
	for i, a := range u.Set {
		u.Set[i] = complete(a, k.assignments[a.TaskId])
	}
	if u.Full {
		k.assignments = make(map[string]*api.Assignment, len(u.Set))
		k.networks = make(map[string]*api.NetworkRecord, len(u.Networks))
	}
	for _, n := range u.Networks {
		k.networks[n.Id] = n
	}
	for _, a := range u.Set {
		k.assignments[a.TaskId] = a
	}
	for _, id := range u.Removed {
		delete(k.assignments, id)
		delete(k.reports, id)
	}
	if u.Full {
		maps.DeleteFunc(k.reports, func(id string, _ *api.TaskReport) bool { return k.assignments[id] == nil })
	}
	if u.Full || len(u.Removed) > 0 {
		k.forgetDependencies()
	}
	return nil
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

// complete keeps what managers leave out of the assignment of an ended task or a removed service.
func complete(a, old *api.Assignment) *api.Assignment {
	if len(a.SpecJson) > 0 || old == nil || len(old.SpecJson) == 0 {
		return a
	}
	c := proto.Clone(old).(*api.Assignment)
	c.Desired, c.State, c.Drained, c.StartAfter = a.Desired, a.State, a.Drained, a.StartAfter
	return c
}

func (k *knowledge) mergeTable(u *api.TableUpdate) error {
	if u.Gone {
		delete(k.tabs, u.Table)
		return nil
	}
	t := k.tabs[u.Table]
	if u.Full {
		t = &table{Table: Table{Nodes: map[uint32]*api.NodeEndpoint{}, Services: map[string]*api.ServiceEndpoint{}, Endpoints: map[string]*api.TaskEndpoint{}}}
		k.tabs[u.Table] = t
	}
	if t == nil {
		return fmt.Errorf("change of table %s to version %d came before its content", u.Table, u.Version)
	}
	t.handed = nil
	t.Version = u.Version
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
	return nil
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
	t := Tables{NodeIndex: k.welcome.NodeIndex, DataPort: k.welcome.DataPort, MeshPool: k.welcome.MeshPool, Networks: map[string]Table{}}
	for id, tab := range k.tabs {
		if id == api.MeshTable {
			t.Mesh = tab.hand()
			continue
		}
		t.Networks[id] = tab.hand()
	}
	return t, true
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
	say(&api.ManagerMessage{Kind: &api.ManagerMessage_Assignments{Assignments: &api.AssignmentUpdate{Sequence: k.sequence, Full: true, Set: set, Networks: networks}}})
	if len(k.reports) > 0 {
		out = append(out, frame{kind: frameReports, msg: &api.StatusBatch{Reports: slices.Collect(maps.Values(k.reports))}})
	}
	for id, t := range k.tabs {
		say(&api.ManagerMessage{Kind: &api.ManagerMessage_Table{Table: &api.TableUpdate{
			Table: id, Version: t.Version, Full: true, Network: t.Network, Nodes: slices.Collect(maps.Values(t.Nodes)),
			Services: slices.Collect(maps.Values(t.Services)), Endpoints: slices.Collect(maps.Values(t.Endpoints)),
		}}})
	}
	return out
}
