package store

import (
	"bytes"

	"google.golang.org/protobuf/proto"

	"skein/manager/allocator"
	"skein/manager/api"
)

func (s *state) setCluster(c *Cluster) {
	old := s.cluster
	s.j.Add(func() { s.cluster = old })
	s.cluster = c
	s.changedObject(KindCluster, c.Id)
}

func (s *state) putCluster(c *api.ClusterRecord) error {
	if err := checkID("cluster", c.Id); err != nil {
		return err
	}
	if err := checkSize("cluster", c.Id, c.SpecJson); err != nil {
		return err
	}
	if s.cluster != nil && s.cluster.Id != c.Id {
		return api.Errorf(errPrecondition, "cluster %s exists already and cannot become cluster %s", s.cluster.Id, c.Id)
	}
	if c.FeatureLevel == 0 {
		c.FeatureLevel = max(1, s.cluster.GetFeatureLevel())
	}
	if c.FeatureLevel > api.FeatureLevel || c.FeatureLevel < s.cluster.GetFeatureLevel() {
		return api.Errorf(errInvalid, "cluster %s: feature level %d is not in %d..%d: it only grows, with the versions of all managers", c.Id, c.FeatureLevel,
			s.cluster.GetFeatureLevel(), api.FeatureLevel)
	}
	if err := s.alloc.SetPools(c); err != nil {
		return err
	}
	c.Meta = nextMeta(s.cluster.GetMeta(), s.version, s.time)
	s.setCluster(c)
	return nil
}

func (s *state) storeNode(n *Node) {
	s.nodes.put(n.Id, n)
	s.changedObject(KindNode, n.Id)
}

func (s *state) putNode(n *api.NodeRecord) error {
	if err := checkID("node", n.Id); err != nil {
		return err
	}
	if err := checkSize("node", n.Id, n.DescriptionJson); err != nil {
		return err
	}
	old := s.nodes.get(n.Id)
	if old == nil {
		most := uint32(allocator.MaxNodeIndex)
		if s.level() < api.LevelMembers {
			most = allocator.OldMaxNodeIndex
		}
		if err := s.alloc.AddNode(n, most); err != nil {
			return err
		}
	} else {
		n.Index, n.Blocks = old.Index, old.Blocks
		if n.Status == nil {
			n.Status = old.Status
		}
	}
	if n.Status != nil {
		n.Status = proto.Clone(n.Status).(*api.NodeStatus)
		n.Status.NodeId = n.Id
		s.stampStatus(old.GetStatus(), n.Status)
	}
	n.Meta = nextMeta(old.GetMeta(), s.version, s.time)
	s.storeNode(n)
	return nil
}

// stampStatus notes since when a node has its state.
func (s *state) stampStatus(old, st *api.NodeStatus) {
	st.Since = 0
	switch {
	case old != nil && old.State == st.State:
		st.Since = old.Since
	case s.level() >= api.LevelHistory:
		st.Since = s.time
	}
}

func (s *state) setNodeStatus(st *api.NodeStatus) error {
	old := s.nodes.get(st.NodeId)
	if old == nil {
		return api.Errorf(errNotFound, "node %s not found", st.NodeId)
	}
	s.stampStatus(old.Status, st)
	if proto.Equal(old.Status, st) {
		return nil
	}
	n := proto.Clone(old).(*api.NodeRecord)
	n.Status, n.Meta = st, nextMeta(old.Meta, s.version, s.time)
	s.storeNode(n)
	return nil
}

// deleteNode removes a node; what still ran there is orphaned and frees what it held.
func (s *state) deleteNode(id string) error {
	n := s.nodes.get(id)
	if n == nil {
		return api.Errorf(errNotFound, "node %s not found", id)
	}
	for _, t := range s.tasks.ofNode(id) {
		if !api.TaskState(s.tasks.row(t).state).Terminal() { // what has ended stays as it ended: a job must not run again
			s.orphan(t, "node "+either(n.Hostname, id)+" was removed from the cluster")
		}
	}
	for _, a := range s.attachmentsOf(nodePair + id) {
		s.dropAttachment(a)
	}
	s.alloc.RemoveNode(n, s.time)
	s.nodes.del(id)
	s.changedObject(KindNode, id)
	return nil
}

// applyService creates or updates a service: revisions, addresses and ports are made here.
func (s *state) applyService(rec *api.ServiceRecord) error {
	if err := checkID("service", rec.Id); err != nil {
		return err
	}
	if err := checkSize("service", rec.Id, rec.SpecJson); err != nil {
		return err
	}
	spec, err := decodeSpec(rec.SpecJson)
	if err != nil {
		return api.Errorf(errInvalid, "service %s: spec is not valid JSON of a service spec: %v", rec.Id, err)
	}
	old := s.services.get(rec.Id)
	rec.Name = either(spec.Name, rec.Name)
	switch holder, taken := s.serviceNames[rec.Name]; {
	case rec.Name == "":
		return api.Errorf(errInvalid, "service %s: name must be provided", rec.Id)
	case old != nil && old.Name != rec.Name:
		return api.Errorf(errInvalid, "service %s: renaming services is not supported: create service %s and remove this one", old.Name, rec.Name)
	case old == nil && s.tasks.lists.hasTasks(rec.Id):
		return api.Errorf(errPrecondition, "service %s: id %s was that of a service whose tasks still exist: choose a new id", rec.Name, rec.Id)
	case taken && holder != rec.Id:
		return api.Errorf(errExists, "name conflicts with an existing object: service %s already exists", rec.Name)
	}
	if n := len(spec.TaskTemplate.Networks); n > maxNetworks {
		return api.Errorf(errInvalid, "service %s: attached to %d networks, the limit is %d", rec.Name, n, maxNetworks)
	}
	for _, id := range networkTargets(spec) {
		if s.networks.get(id) == nil {
			return api.Errorf(errNotFound, "service %s: network %s not found", rec.Name, id)
		}
	}
	if s.level() >= api.LevelNetworks {
		if err := s.alloc.Apart(networkTargets(spec)); err != nil {
			return api.Errorf(errInvalid, "service %s: %v", rec.Name, err)
		}
	}
	if err := s.checkDependencies(rec.Name, spec); err != nil {
		return err
	}
	if err := s.revise(rec, old, isJob(spec)); err != nil {
		return err
	}
	if s.level() < api.LevelNetworks {
		rec.Avoid = nil
	}
	vips, ports := old.held()
	if rec.Vips, rec.Ports, err = s.alloc.SetService(serviceRequest(rec, spec), vips, ports, s.time); err != nil {
		return err
	}
	rec.Avoid = nil
	v, err := newService(rec, old)
	if err != nil {
		return err
	}
	s.putService(v)
	return nil
}

func (v *Service) held() ([]*api.VIP, []*api.PortConfig) {
	if v == nil {
		return nil, nil
	}
	return v.Vips, v.Ports
}

// revise sets the record's revision fields: a changed or forced spec becomes a new revision, and rollback returns to the one before. Every
// write of a job is a new revision: it is executed again, also when nothing of it changed.
func (s *state) revise(rec *api.ServiceRecord, old *Service, job bool) error {
	rec.Meta = nextMeta(nil, s.version, s.time)
	rec.Revision, rec.Previous, rec.PreviousSpecJson = 1, 0, nil
	rec.Revisions = nil
	if rec.UpdateStatus != nil {
		rec.UpdateStatus.ServiceId = rec.Id
	}
	fresh := &api.Revision{Number: 1, SpecJson: rec.SpecJson, Created: s.time}
	if s.level() >= api.LevelHistory {
		fresh.Author, fresh.Note = rec.Author, rec.Note
	}
	if len(fresh.Author) > maxAuthor || len(fresh.Note) > maxNote {
		return api.Errorf(errInvalid, "service %s: its author has %d bytes, its note %d: the limits are %d and %d", rec.Name, len(fresh.Author), len(fresh.Note), maxAuthor, maxNote)
	}
	var err error
	if fresh.RegistryAuth, err = s.credentials(rec, old); err != nil {
		return err
	}
	forget := rec.ForgetPrevious && s.level() >= api.LevelHistory
	rec.Author, rec.Note, rec.ForgetPrevious, rec.RegistryAuth = "", "", false, nil
	if old == nil {
		rec.Revisions = []*api.Revision{fresh}
		return nil
	}
	rec.Meta = nextMeta(old.Meta, s.version, s.time)
	rec.Revision, rec.Previous, rec.PreviousSpecJson = old.Revision, old.ServiceRecord.Previous, old.PreviousSpecJson
	changed := job || !bytes.Equal(rec.SpecJson, old.SpecJson) || rec.ForceUpdate != old.ForceUpdate
	if changed {
		rec.Revision, rec.Previous, rec.PreviousSpecJson = old.Revision+1, old.Revision, old.SpecJson
		fresh.Number = rec.Revision
		if s.level() >= api.LevelHistory {
			s.remember(old, rec.SpecJson)
		}
	}
	if forget {
		rec.Previous, rec.PreviousSpecJson = 0, nil
	}
	for _, r := range old.Revisions {
		if r.Number == rec.Revision || r.Number == rec.Previous || s.tasks.lists.used(rec.Id, r.Number) > 0 {
			rec.Revisions = append(rec.Revisions, r)
		}
	}
	if changed {
		rec.Revisions = append(rec.Revisions, fresh)
	} else if last := len(rec.Revisions) - 1; !bytes.Equal(rec.Revisions[last].RegistryAuth, fresh.RegistryAuth) { // new credentials make no new tasks
		now := proto.Clone(rec.Revisions[last]).(*api.Revision)
		now.RegistryAuth = fresh.RegistryAuth
		rec.Revisions[last] = now
	}
	return nil
}

// deleteService removes a service. Its tasks are asked to go; those that never reached a node go at once.
func (s *state) deleteService(id string) error {
	v := s.services.get(id)
	if v == nil {
		return api.Errorf(errNotFound, "service %s not found", id)
	}
	s.removeService(v)
	s.forgetPast(id)
	s.alloc.RemoveService(id, v.Vips, v.Ports, s.time)
	var tasks []rowID
	s.tasks.ofService(id, func(t rowID) bool {
		tasks = append(tasks, t)
		return true
	})
	for _, t := range tasks {
		if r := s.tasks.row(t); api.TaskState(r.state) < api.TaskAssigned {
			s.removeTask(t)
		} else if api.TaskState(r.desired) < api.TaskRemove {
			s.touch(t).desired = uint32(api.TaskRemove)
			s.changed(t)
		}
	}
	return nil
}

func (s *state) setUpdateStatus(st *api.UpdateStatus) error {
	old := s.services.get(st.ServiceId)
	if old == nil {
		return api.Errorf(errNotFound, "service %s not found", st.ServiceId)
	}
	if proto.Equal(old.UpdateStatus, st) {
		return nil
	}
	v := old.withRevisions(func(uint64) bool { return true })
	v.UpdateStatus, v.Meta = st, nextMeta(old.Meta, s.version, s.time)
	s.putService(v)
	return nil
}

func (s *state) putNetwork(n *api.NetworkRecord) error {
	if err := checkID("network", n.Id); err != nil {
		return err
	}
	if err := checkSize("network", n.Id, n.SpecJson); err != nil {
		return err
	}
	old := s.networks.get(n.Id)
	if old != nil {
		if old.Name != n.Name || n.Driver != old.Driver || n.Internal != old.Internal {
			return api.Errorf(errPrecondition, "network %s: name, driver and internal cannot change: remove it and create it anew", old.Name)
		}
		n.Vni, n.Subnet4, n.Subnet6 = old.Vni, old.Subnet4, old.Subnet6
		n.Ranges, n.NoIpv6, n.NoGrowth, n.Avoid = old.Ranges, old.NoIpv6, old.NoGrowth, old.Avoid
	} else {
		if err := s.addNetwork(n); err != nil {
			return err
		}
	}
	n.Meta = nextMeta(old.GetMeta(), s.version, s.time)
	s.networks.put(n.Id, n)
	clear(s.requests)
	s.changedObject(KindNetwork, n.Id)
	return nil
}

func (s *state) addNetwork(n *api.NetworkRecord) error {
	if n.Driver == "" {
		n.Driver = "overlay"
	}
	switch _, taken := s.networkNames[n.Name]; {
	case n.Name == "":
		return api.Errorf(errInvalid, "network %s: name must be provided", n.Id)
	case taken:
		return api.Errorf(errExists, "network with name %s already exists", n.Name)
	case n.Driver != "overlay":
		return api.Errorf(errInvalid, "network %s: driver %q is not a driver for cluster networks: use overlay", n.Name, n.Driver)
	case nodeNetwork(n.Name):
		return api.Errorf(errInvalid, "network %s: the name is that of a network every node has: choose another", n.Name)
	}
	if t := s.attached(n.Id, api.TaskOrphaned); t != "" {
		return api.Errorf(errPrecondition, "network %s: id %s was that of a network task %s still hangs on: choose a new id", n.Name, n.Id, t)
	}
	allocator.Set(s.j, s.networkNames, n.Name, n.Id)
	return s.alloc.AddNetwork(n)
}

// attached finds the living task with the lowest id on a network that is wanted at most as much as desired, looking at all.
func (s *state) attached(network string, desired api.TaskState) (task string) {
	on := s.formsOf(network)
	if len(on) == 0 {
		return ""
	}
	a := attachment{s: s, on: on, desired: desired}
	s.tasks.each(func(id rowID, _ *taskPage, _ *taskRow) { a.look(id) })
	return a.task()
}

// holder is attached for a network that exists. How many addresses are held is known, so it ends when all were seen. Services that are there
// left the network, so those that are gone are the likely ones: their tasks are looked at first, and the others' only if an update is not done.
func (s *state) holder(network string, desired api.TaskState) (task string) {
	held := s.alloc.Held(network)
	if held == 0 {
		return ""
	}
	a := attachment{s: s, on: s.formsOf(network), desired: desired}
	for _, service := range s.tasks.lists.services.id {
		if service != "" && s.services.get(service) == nil {
			s.tasks.ofService(service, func(id rowID) bool {
				a.look(id)
				return a.seen < held
			})
		}
	}
	if a.seen < held {
		return s.attached(network, desired)
	}
	return a.task()
}

// formsOf are the numbers of the forms with addresses of a network.
func (s *state) formsOf(network string) map[uint32]bool {
	on := map[uint32]bool{}
	for n, f := range s.tasks.forms.list {
		if network != "" && f != nil && f.network == network {
			on[uint32(n)] = true
		}
	}
	return on
}

// attachment looks for tasks with addresses of some forms.
type attachment struct {
	s       *state
	on      map[uint32]bool
	desired api.TaskState
	seen    int // such addresses of living tasks
	found   bool
	least   api.ID // of those wanted at most as much as desired
}

func (a *attachment) look(id rowID) {
	r := a.s.tasks.row(id)
	if !r.live() {
		return
	}
	before := a.seen
	d := readSide(a.s.tasks.sideOf(id))
	d.eachAddress(func(form, _ uint32) {
		if a.on[form] {
			a.seen++
		}
	})
	if a.seen > before && api.TaskState(r.desired) <= a.desired && (!a.found || r.id().Compare(a.least) < 0) {
		a.found, a.least = true, r.id()
	}
}

func (a *attachment) task() string {
	if !a.found {
		return ""
	}
	return a.least.String()
}

// deleteNetwork removes a network no service refers to and no task that is wanted hangs on.
func (s *state) deleteNetwork(id string) error {
	n := s.networks.get(id)
	if n == nil {
		return api.Errorf(errNotFound, "network %s not found", id)
	}
	if users := s.servicesUsing(id); len(users) > 0 {
		return api.Errorf(errPrecondition, "network %s is in use by service %s: remove the service or detach it first", n.Name, s.services.get(users[0]).Name)
	}
	if n.Ingress && s.level() >= api.LevelNetworks && s.alloc.Published() > 0 {
		return api.Errorf(errPrecondition, "ingress network %s cannot be removed: services publish ports through it", n.Name)
	}
	if err := s.leaveNetwork(n); err != nil {
		return err
	}
	if t := s.holder(id, api.TaskRunning); t != "" {
		return api.Errorf(errPrecondition, "network %s is in use by task %s: wait until the service's update is done", n.Name, t)
	}
	allocator.Unset(s.j, s.networkNames, n.Name)
	s.alloc.RemoveNetwork(n, s.time)
	s.networks.del(id)
	clear(s.requests)
	s.changedObject(KindNetwork, id)
	return nil
}
