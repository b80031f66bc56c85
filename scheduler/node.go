package scheduler

import "strings"

// State is how far a node may be used, the worst reason winning.
type State uint8

// The states of a node.
const (
	Ready   State = iota // takes tasks
	Unknown              // not heard of since the manager took over
	Down
	Paused  // keeps what it has, takes nothing new
	Drained // gives away what it has
)

// Node is what the scheduler must know of a machine.
type Node struct {
	ID           string
	Hostname     string
	Role         string // "worker" or "manager"
	Addr         string // plain IP address
	Platform     Platform
	Labels       map[string]string // set by the operator
	EngineLabels map[string]string // set by the node
	Total        Resources
	Generic      []Count  // of each kind what the node has in all
	Plugins      []Plugin // drivers it has
	State        State
}

// Count is a number of things of one kind, as in "two GPUs".
type Count struct {
	Kind string
	N    int64
}

// Plugin is a driver by type ("Volume", "Network", "Log") and name.
type Plugin struct {
	Type, Name string
}

// Resources are what a node has, or a task reserves.
type Resources struct {
	NanoCPUs    int64
	MemoryBytes int64
}

// Platform is an operating system and an architecture; an empty half stands for any.
type Platform struct {
	OS, Arch string
}

// Port is a port of the host that a task needs for itself.
type Port struct {
	Protocol string // "tcp", "udp", "sctp"
	Number   uint16
}

// Requirements are the hard rules and soft preferences of a task. Immutable once handed over.
type Requirements struct {
	Reserve     Resources
	Generic     []Count // each kind once
	Constraints []Constraint
	Platforms   []Platform // one of them; empty: any
	Plugins     []Plugin   // all of them
	Ports       []Port
	MaxPerNode  int      // tasks of the service on one node, 0 unlimited
	Spread      []string // labels to spread over, outermost first: "node.labels.zone"
}

// Strategy says which of the nodes that may take a task is the best.
type Strategy uint8

// The strategies.
const (
	Spread  Strategy = iota // the node with the fewest tasks of the service, then the fewest tasks
	Binpack                 // the node with the least room left, so that others stay empty
)

// hasPlugins reports whether the node has all drivers that tasks need. A node that reports no driver of a type is not asked for one of
// it: nodes of old do not tell their log drivers.
func (r *Requirements) hasPlugins(n *Node) bool { return r.missingPlugin(n) == "" }

func (r *Requirements) missingPlugin(n *Node) string {
	for _, want := range r.Plugins {
		told, has := false, false
		for _, p := range n.Plugins {
			told = told || p.Type == want.Type
			has = has || p == want
		}
		if told && !has {
			return want.Type + " " + want.Name
		}
	}
	return ""
}

// normalize maps the names that uname, Go and Docker give to the same thing onto one.
func (p Platform) normalize() Platform {
	p = Platform{OS: strings.ToLower(p.OS), Arch: strings.ToLower(p.Arch)}
	switch p.Arch {
	case "x86_64", "x86-64":
		p.Arch = "amd64"
	case "aarch64", "arm64/v8":
		p.Arch = "arm64"
	}
	return p
}

// runs reports whether a node of platform p runs images of platform want.
func (p Platform) runs(want Platform) bool {
	p, want = p.normalize(), want.normalize()
	return (want.OS == "" || want.OS == p.OS) && (want.Arch == "" || want.Arch == p.Arch)
}
