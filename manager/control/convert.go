package control

import (
	"encoding/json"
	"net/netip"
	"time"

	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
	"skein/manager/store"
)

func meta(m *api.Meta) swarm.Meta {
	return swarm.Meta{Version: swarm.Version{Index: m.GetVersion()}, CreatedAt: instant(m.GetCreated()), UpdatedAt: instant(m.GetUpdated())}
}

func instant(nanos int64) time.Time {
	if nanos == 0 {
		return time.Time{}
	}
	return time.Unix(0, nanos).UTC()
}

func instantOrNil(nanos int64) *time.Time {
	if nanos == 0 {
		return nil
	}
	t := instant(nanos)
	return &t
}

func serviceObject(tx store.ReadTx, svc *store.Service) swarm.Service {
	o := swarm.Service{ID: svc.Id, Meta: meta(svc.Meta), Spec: labelled(*svc.Spec)}
	if svc.Previous != nil {
		o.PreviousSpec = ptr(labelled(*svc.Previous))
	}
	if es := svc.Spec.EndpointSpec; es != nil {
		o.Endpoint.Spec = *es
	}
	o.Endpoint.Ports = ports(svc.Ports)
	for _, v := range svc.Vips {
		vip := swarm.EndpointVirtualIP{NetworkID: v.NetworkId}
		if a, err := netip.ParseAddr(v.Addr4); err == nil {
			vip.Addr = prefixOn(tx.Network(v.NetworkId), a)
		}
		o.Endpoint.VirtualIPs = append(o.Endpoint.VirtualIPs, vip)
	}
	if svc.Job() {
		o.JobStatus = &swarm.JobStatus{JobIteration: *jobIteration(svc.Revision), LastExecution: instant(revisionCreated(svc))}
	}
	if u := svc.UpdateStatus; u.GetState() != "" {
		o.UpdateStatus = &swarm.UpdateStatus{State: swarm.UpdateState(u.State), StartedAt: instantOrNil(u.Started), CompletedAt: instantOrNil(u.Completed), Message: u.Message}
	}
	return o
}

// jobIteration numbers the executions of a job from 0: each of its revisions is one.
func jobIteration(revision uint64) *swarm.Version { return &swarm.Version{Index: revision - 1} }

func revisionCreated(svc *store.Service) int64 {
	for _, r := range svc.Revisions {
		if r.Number == svc.Revision {
			return r.Created
		}
	}
	return 0
}

// labelled has a map of labels, be it empty: clients index it.
func labelled(spec swarm.ServiceSpec) swarm.ServiceSpec {
	if spec.Labels == nil {
		spec.Labels = map[string]string{}
	}
	return spec
}

func ports(in []*api.PortConfig) []swarm.PortConfig {
	var out []swarm.PortConfig
	for _, p := range in {
		out = append(out, swarm.PortConfig{Name: p.Name, Protocol: network.IPProtocol(p.Protocol), TargetPort: p.Target, PublishedPort: p.Published,
			PublishMode: swarm.PortConfigPublishMode(p.Mode)})
	}
	return out
}

// taskObject shows a task; soft is what its agent said since the last entry of the log, or nil.
func taskObject(tx store.ReadTx, t *store.Task, soft *api.TaskReport) swarm.Task {
	o := swarm.Task{
		ID: t.ID, Meta: swarm.Meta{Version: swarm.Version{Index: t.Version}, CreatedAt: instant(t.Created), UpdatedAt: instant(t.Updated)},
		ServiceID: t.ServiceID, Slot: int(t.Slot), NodeID: t.NodeID, DesiredState: swarm.TaskState(t.Desired.String()),
	}
	o.Labels = map[string]string{}
	if svc := tx.Service(t.ServiceID); svc != nil {
		if spec := svc.Revs[t.Revision]; spec != nil {
			o.Spec = spec.TaskTemplate
		}
		if svc.Job() {
			o.JobIteration = jobIteration(t.Revision)
			o.DesiredState = swarm.TaskState(shownDesire(svc, t.Desired).String())
			o.Slot = max(o.Slot-1, 0) // docker counts the slots of jobs from 0
		}
	}
	if o.Spec.ContainerSpec == nil { // its service is gone, the task not yet; docker's CLI reads the image without a look
		o.Spec.ContainerSpec = &swarm.ContainerSpec{}
	}
	o.Status = taskStatus(t, soft)
	if x := tx.TaskExtra(t.ID); x != nil {
		o.GenericResources = assigned(x.Generic)
		if o.Status.Err == "" {
			o.Status.Err = x.Reason
		}
	}
	for _, a := range t.Attachments {
		att := swarm.NetworkAttachment{}
		if n := tx.Network(a.NetworkId); n != nil {
			att.Network = swarmNetwork(n)
		} else {
			att.Network.ID = a.NetworkId
		}
		if p, err := netip.ParsePrefix(a.Addr4); err == nil {
			att.Addresses = append(att.Addresses, p)
		}
		o.NetworksAttachments = append(o.NetworksAttachments, att)
	}
	return o
}

// shownDesire is the state that docker shows as wanted: tasks of jobs are wanted to complete.
func shownDesire(svc *store.Service, desired api.TaskState) api.TaskState {
	if svc != nil && svc.Job() && desired == api.TaskRunning {
		return api.TaskComplete
	}
	return desired
}

func taskStatus(t *store.Task, soft *api.TaskReport) swarm.TaskStatus {
	state, r := t.State, t.Status
	if soft != nil && api.TaskState(soft.State) > state { // of two reports the greater is true
		state, r = api.TaskState(soft.State), soft
	}
	if state == api.TaskNew {
		state = api.TaskPending
	}
	st := swarm.TaskStatus{State: swarm.TaskState(state.String()), Timestamp: instant(t.Updated), PortStatus: swarm.PortStatus{Ports: ports(t.HostPorts)}}
	switch {
	case r == nil && state == api.TaskPending:
		st.Message = "pending task scheduling"
	case r == nil:
		st.Message = "scheduler assigned task to node"
	default:
		if r.Time != 0 {
			st.Timestamp = instant(r.Time)
		}
		st.Message, st.Err = r.Message, r.Err
		if r.ContainerId != "" || r.Pid != 0 || r.ExitCode != 0 {
			st.ContainerStatus = &swarm.ContainerStatus{ContainerID: r.ContainerId, PID: int(r.Pid), ExitCode: int(r.ExitCode)}
		}
		if len(r.Ports) > 0 {
			st.PortStatus.Ports = ports(r.Ports)
		}
	}
	return st
}

// swarmNetwork is a network as tasks show it.
func swarmNetwork(n *store.Network) swarm.Network {
	o := swarm.Network{ID: n.Id, Meta: meta(n.Meta), DriverState: swarm.Driver{Name: n.Driver, Options: networkOptions(n)}}
	o.Spec.Name, o.Spec.Labels = n.Name, n.Labels
	if o.Spec.Labels == nil {
		o.Spec.Labels = map[string]string{}
	}
	o.Spec.DriverConfiguration = &swarm.Driver{Name: n.Driver}
	o.Spec.Internal, o.Spec.Attachable, o.Spec.Ingress, o.Spec.Scope = n.Internal, n.Attachable, n.Ingress, "swarm"
	o.IPAMOptions = &swarm.IPAMOptions{Driver: swarm.Driver{Name: "default"}}
	for _, c := range ipamConfig(n) {
		o.IPAMOptions.Configs = append(o.IPAMOptions.Configs, swarm.IPAMConfig{Subnet: c.Subnet, Range: c.IPRange, Gateway: c.Gateway})
	}
	return o
}

func (s *Server) nodeObject(c *store.Cluster, n *store.Node) swarm.Node {
	o := swarm.Node{ID: n.Id, Meta: meta(n.Meta)}
	o.Spec.Name, o.Spec.Labels = n.Name, n.Labels
	if o.Spec.Labels == nil {
		o.Spec.Labels = map[string]string{}
	}
	o.Spec.Role, o.Spec.Availability = swarm.NodeRole(n.Role), swarm.NodeAvailability(n.Availability)
	o.Description = description(n)
	o.Description.TLSInfo = nodeTLS(c, n.Tls)
	o.Status = swarm.NodeStatus{State: swarm.NodeState(n.Status.GetState()), Message: n.Status.GetMessage()}
	if o.Status.State == "" {
		o.Status.State = swarm.NodeStateUnknown
	}
	if ap, err := netip.ParseAddrPort(n.RpcAddr); err == nil {
		o.Status.Addr = ap.Addr().String()
	}
	if n.Role != api.RoleManager {
		return o
	}
	if member, leader, reachable := s.cfg.Managers.ManagerStatus(n.Id); member {
		o.ManagerStatus = &swarm.ManagerStatus{Leader: leader, Reachability: swarm.ReachabilityUnreachable, Addr: n.RpcAddr}
		if reachable {
			o.ManagerStatus.Reachability = swarm.ReachabilityReachable
		}
	}
	return o
}

// description is what the agent said of the node; before it did, the host name is all we know.
func description(n *store.Node) swarm.NodeDescription {
	var d swarm.NodeDescription
	if len(n.DescriptionJson) > 0 {
		_ = json.Unmarshal(n.DescriptionJson, &d) // checked when it was taken in
	}
	if d.Hostname == "" {
		d.Hostname = n.Hostname
	}
	return d
}
