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
	State        State
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
	Constraints []Constraint
	Platforms   []Platform // one of them; empty: any
	Ports       []Port
	MaxPerNode  int      // tasks of the service on one node, 0 unlimited
	Spread      []string // labels to spread over, outermost first: "node.labels.zone"
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
