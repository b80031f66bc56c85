package control

import (
	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
	"skein/manager/store"
)

// The ingress network is the routing mesh as users see it: there is one at most, services publish ports through it, and without it they cannot.

// ingressReserves is the warning for a subnet that somebody chose for it.
const ingressReserves = "the routing mesh gives containers addresses of their node's block: the subnet of an ingress network is kept free of other networks, and not used"

// checkIngress refuses what an ingress network cannot be.
func checkIngress(a at, req *network.CreateRequest) error {
	switch {
	case !req.Ingress:
		return nil
	case req.Attachable:
		return a.field("Attachable").bad(true, "ingress network cannot be attachable")
	case req.Internal:
		return a.field("Internal").bad(true, "ingress network cannot be internal: the ports that it publishes are reached from outside")
	}
	if v, ok := req.Options[optEncrypted]; ok && v != "false" {
		return a.field("Options").key(optEncrypted).unbuilt(v, "an encrypted ingress network")
	}
	if v, ok := req.Options[optVNI]; ok {
		return a.field("Options").key(optVNI).unbuilt(v, "a VNI of your choice for the ingress network")
	}
	return nil
}

// narrowMTU is the warning for an MTU that no device with IPv6 can have.
const narrowMTU = "devices with IPv6 have an MTU of at least 1280: that is what this network gets"

// networkWarnings tell what of a request is done differently.
func networkWarnings(rec *api.NetworkRecord, subnet bool) []string {
	var out []string
	if rec.Ingress && subnet {
		out = append(out, ingressReserves)
	}
	if rec.Mtu != 0 && rec.Mtu < 1280 {
		out = append(out, narrowMTU)
	}
	return out
}

// ingressNetwork is the one there is, or nil.
func ingressNetwork(tx store.ReadTx) *store.Network {
	for _, n := range tx.Networks() {
		if n.Ingress {
			return n
		}
	}
	return nil
}

// onlyIngress refuses a second one.
func onlyIngress(tx store.ReadTx, rec *api.NetworkRecord) error {
	if n := ingressNetwork(tx); rec.Ingress && n != nil {
		return api.Errorf(errdefs.ErrAlreadyExists, "ingress network (%s) is already present: remove it first (docker network rm %s)", n.Id, n.Name)
	}
	return nil
}

// needsIngress reports whether a service publishes ports through the mesh.
func needsIngress(spec *swarm.ServiceSpec) bool {
	if spec.EndpointSpec == nil {
		return false
	}
	for _, p := range spec.EndpointSpec.Ports {
		if p.PublishMode == "" || p.PublishMode == swarm.PortConfigPublishModeIngress {
			return true
		}
	}
	return false
}

// hasIngress refuses a service that publishes ports through a mesh that there is not.
func hasIngress(tx store.ReadTx, spec *swarm.ServiceSpec) error {
	if needsIngress(spec) && ingressNetwork(tx) == nil {
		return api.Errorf(errdefs.ErrFailedPrecondition, "service %s needs ingress network, but no ingress network is present: create one (docker network create --driver overlay --ingress NAME), or publish its ports in mode host", spec.Name)
	}
	return nil
}

// ingressUsers refuses to remove the ingress network while a service publishes ports.
func ingressUsers(tx store.ReadTx, n *store.Network) error {
	if !n.Ingress {
		return nil
	}
	for _, svc := range tx.Services() {
		if needsIngress(svc.Spec) {
			return api.Errorf(errdefs.ErrFailedPrecondition, "ingress network %s cannot be removed because service %s depends on it", n.Name, svc.Name)
		}
	}
	return nil
}
