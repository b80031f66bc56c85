// Package overlay programs this node's container networks.
//
// Set receives the whole desired state and makes the kernel agree with it; calling it twice changes nothing, and a crash half-way is
// repaired by the next call. Everything it creates carries our prefix or lives in our nft tables, so leftovers can be told from other
// people's objects. It knows addresses, names and VNIs, never tasks or orchestration. Used by agent/engine.
package overlay

import (
	"net/netip"

	"skein/overlay/crypt"
	"skein/overlay/dns"
)

// Config is the whole desired state of this node's networks.
type Config struct {
	Self     Node   // this node
	Peers    []Node // every other node of the cluster
	Networks []Network
	// Mesh is everything published in the cluster: each entry's port answers on this node.
	Mesh Mesh
	// DataPort is the VXLAN UDP port.
	DataPort uint16
	// MeshPool is the pool of node blocks: node i owns the i-th /22 of it; the first address of a block is the node's own.
	MeshPool netip.Prefix
	// MeshPool6 is the cluster's IPv6 prefix of 48 bits, or invalid: node i owns the i-th /112 of its first /64.
	MeshPool6 netip.Prefix
	// NodeAddrs are further addresses of nodes, of both families: a client that has one is a process of a node.
	NodeAddrs []netip.Addr
	// Keys are the other nodes' keys of encrypted networks by index, a node's oldest first.
	Keys map[uint32][]crypt.Key
}

// Node is a cluster member as the network sees it. Index is 1..16382 and names its mesh block, MAC addresses and marks.
type Node struct {
	Index    uint32
	Hostname string
	Underlay netip.Addr // where its VXLAN packets go
}

// Network is one VXLAN network that has an endpoint on this node.
type Network struct {
	ID      string
	Name    string
	VNI     uint32
	Subnet4 netip.Prefix
	Subnet6 netip.Prefix // invalid when the network has none
	// More are further ranges, of either family, whose addresses are on the network too. They only become more.
	More []netip.Prefix
	// Router4 and Router6 are the routers' addresses, the same on every node; invalid: the first ones of the subnets.
	Router4, Router6 netip.Addr
	MTU              int  // 0: derived from the underlay
	Internal         bool // no gateway leg for its endpoints
	// Encrypted networks leave the node inside WireGuard only.
	Encrypted bool
	Services  []Service
	// Endpoints of the whole cluster on this network, local ones too.
	Endpoints []Endpoint
}

// Service is a name with a VIP on one network.
type Service struct {
	ID         string
	Names      []string
	VIP4, VIP6 netip.Addr // invalid with DNSRR
	DNSRR      bool
	Ports      []dns.Port // with names, for SRV queries
}

// EndpointState decides what an endpoint takes part in: all states have routes; only Ready ones are in VIPs, the mesh and DNS.
type EndpointState string

// States of an endpoint.
const (
	Starting EndpointState = "starting"
	Ready    EndpointState = "ready"
	Draining EndpointState = "draining"
	// Lost endpoints are on a node that the managers call down. They may well be alive.
	Lost EndpointState = "lost"
)

// Endpoint is one container on one network.
type Endpoint struct {
	ID        string // task or container id
	ServiceID string // empty for a plain container
	Node      uint32 // index
	Addr4     netip.Addr
	Addr6     netip.Addr
	State     EndpointState
	Names     []string // names of this container besides the service's
}

// Mesh is the routing mesh: published ports of the cluster and their backends' gateway addresses.
type Mesh struct {
	MTU   int // 0: derived from the underlay
	Ports []PublishedPort
	// Leaving were backends and take no new clients; flows to them go on. Lost ones are on nodes that the managers call down.
	Leaving, Lost []Backend
}

// PublishedPort is one port that answers on every node (or, Local, on this node only: host mode).
type PublishedPort struct {
	ServiceID string
	Protocol  string // tcp, udp
	Published uint16
	Target    uint16
	Local     bool
	Backends  []Backend
	// Soon are endpoints of this node that are about to be backends. They may be reached already, because another node may deal to
	// them before this one does.
	Soon []Backend
}

// Backend is a task's gateway address. Only ready ones are listed.
type Backend struct {
	EndpointID string
	Node       uint32
	Addr4      netip.Addr
	Addr6      netip.Addr
}

// Sandbox is a container's network namespace and its legs.
type Sandbox struct {
	ID   string // container id; the namespace is NetnsDir/ID
	Legs []Leg
	// Gateway, when valid, adds the gateway leg (eth for published ports and egress) with this address of the node's block.
	Gateway4, Gateway6 netip.Addr
	// Bridge, when set, attaches to a single-host bridge network instead of or beside overlay legs.
	Bridges []BridgeLeg
	// DNS answers on 127.0.0.11:53 inside the namespace when true.
	DNS       bool
	SearchDNS []string
	// Upstreams are the container's own resolvers for foreign names; empty: the node's.
	Upstreams []netip.AddrPort
}

// Leg is an endpoint on an overlay network; the device is eth<N> in the order given.
type Leg struct {
	NetworkID string
	Addr4     netip.Prefix
	Addr6     netip.Prefix
}

// HostPort publishes a container's port on a host address. 0.0.0.0 and the invalid address are all IPv4 addresses, :: is all IPv6 addresses.
type HostPort struct {
	HostIP    netip.Addr
	Published uint16
	Target    uint16
	Protocol  string // tcp, udp, sctp
}

// Applied reports the outcome of Set per network id, and "mesh".
type Applied map[string]error

// The package's main type is Driver:
//
//	New(Options) (*Driver, error)                       // probes the kernel, adopts what exists, starts nothing
//	(*Driver).Set(ctx, Config) (Applied, error)         // level-triggered, serialised inside
//	(*Driver).AddSandbox(ctx, Sandbox) (nsPath string, err error) // idempotent: creates or mends
//	(*Driver).RemoveSandbox(ctx, id string) error       // idempotent
//	(*Driver).Sandboxes() ([]string, error)             // ids found in the kernel, for orphan removal
//	(*Driver).SetBridges(ctx, []Bridge) error           // whole desired set of single-host bridges
//	(*Driver).Run(ctx) error                            // DNS serving, full comparison every minute
//	(*Driver).Teardown(ctx) error                       // removes everything of ours from this node
