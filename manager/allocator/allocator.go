// Package allocator hands out what must be unique in the cluster: VNIs, subnets, virtual addresses, task addresses, node indexes and
// published ports.
//
// It runs inside the store's Apply and therefore is deterministic: no clock but the entry's, no randomness, no map order, no I/O. The
// lowest free value wins; a released address rests (quarantine) before it is handed out again. All of it can be rebuilt from the
// records and the quarantine of a snapshot; what a value is held by is a record's field, never state of its own. Every change goes
// through the caller's Journal, so that a refused transaction leaves nothing behind. Not safe for concurrent use: the store's lock
// guards it. Used by manager/store only.
package allocator

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/containerd/errdefs"

	"skein/manager/api"
)

// Bounds and defaults. They are part of the log's meaning: changing one changes what old entries do, so it needs a feature level.
const (
	AddressRest = 60 * time.Second // a released address or subnet rests this long, by entry time
	IndexRest   = 24 * time.Hour   // a removed node's index

	// MaxNodeIndex is the highest index in the largest mesh pool; see State.maxIndex for a smaller one.
	MaxNodeIndex = 16382
	// OldMaxNodeIndex is the highest that versions before api.LevelMembers know.
	OldMaxNodeIndex = 4094
	nodeBits        = 22 // a node's block of the mesh pool

	firstVNI = 4097
	maxVNI   = 1<<24 - 1

	dynamicFirst = 30000
	dynamicLast  = 32767

	// DefaultOverlayPool and the next are used when the cluster record names no pool.
	DefaultOverlayPool = "10.0.0.0/9"
	DefaultMeshPool    = "10.192.0.0/10"
	DefaultOverlayBits = 20
)

// State is everything that is handed out now.
type State struct {
	j       *Journal
	onGrow  func(network string, r *api.NetworkRange)
	onBlock func(node string, index uint32)
	level   uint32 // feature level
	overlay []netip.Prefix
	mesh    netip.Prefix
	ula     netip.Prefix // invalid: no IPv6
	bits    int

	pools    map[string]*pool // by network id
	meshes   map[string]*pool // by node id
	networks map[string]network
	vnis     map[uint32]string
	nextVNI  uint32
	indexes  map[uint32]string // node id by index
	blocks   map[uint32]string // node id by the index of a further block

	names    map[string]string // service names, for errors
	ingress  map[Port]string   // service id
	hostWish map[Port]map[string]bool
	hostUsed map[nodePort]string // task id
	generic  genericUse
	fixed6   map[fixedKey]string // container id

	rest     queue // addresses and subnets, AddressRest
	restIdx  queue // node indexes, IndexRest
	restNets map[netip.Prefix]int
}

// network is what ranges that are chosen here must not overlap.
type network struct {
	name   string
	ranges []span
}

// span is one range of a network; v6 may be invalid.
type span struct{ v4, v6 netip.Prefix }

// New returns a state in which nothing is handed out. Every later change adds its undo to j. A network that is full and gets a further range
// while something is allocated is told to onGrow, which has its record hold it; a node that gets a further block to onBlock.
func New(j *Journal, onGrow func(network string, r *api.NetworkRange), onBlock func(node string, index uint32)) *State {
	return &State{
		j:        j,
		onGrow:   onGrow,
		onBlock:  onBlock,
		level:    1,
		overlay:  []netip.Prefix{netip.MustParsePrefix(DefaultOverlayPool)},
		mesh:     netip.MustParsePrefix(DefaultMeshPool),
		bits:     DefaultOverlayBits,
		pools:    map[string]*pool{},
		meshes:   map[string]*pool{},
		networks: map[string]network{},
		vnis:     map[uint32]string{},
		nextVNI:  firstVNI,
		generic:  newGenericUse(),
		indexes:  map[uint32]string{},
		blocks:   map[uint32]string{},
		names:    map[string]string{},
		ingress:  map[Port]string{},
		hostWish: map[Port]map[string]bool{},
		hostUsed: map[nodePort]string{},
		fixed6:   map[fixedKey]string{},
		rest:     queue{rest: AddressRest},
		restIdx:  queue{rest: IndexRest},
		restNets: map[netip.Prefix]int{},
	}
}

// SetPools checks the cluster's pools, fills in the defaults of c and uses them from now on. Pools in use cannot change.
func (s *State) SetPools(c *api.ClusterRecord) error {
	if c.OverlayPool == "" {
		c.OverlayPool = DefaultOverlayPool
	}
	if c.MeshPool == "" {
		c.MeshPool = DefaultMeshPool
	}
	if c.OverlayBits == 0 {
		c.OverlayBits = DefaultOverlayBits
	}
	overlay, err := overlayPools(c)
	if err != nil {
		return err
	}
	mesh, err := parsePool("mesh", c.MeshPool)
	if err != nil {
		return err
	}
	var ula netip.Prefix
	if c.UlaPrefix != "" {
		if ula, err = netip.ParsePrefix(c.UlaPrefix); err != nil || !ula.Addr().Is6() || ula.Bits() != 48 || ula != ula.Masked() {
			return invalid("set the cluster's pools: IPv6 prefix %q is not a /48 such as fd12:3456:789a::/48", c.UlaPrefix)
		}
	}
	bits := int(c.OverlayBits)
	switch {
	case bits > 29:
		return invalid("set the cluster's pools: subnet size /%d does not fit overlay pool %s: choose %d..29", bits, overlay[0], overlay[0].Bits())
	case mesh.Bits() > nodeBits-1:
		return invalid("set the cluster's pools: mesh pool %s is too small: each node needs a /%d of it, so give it a /%d or larger",
			mesh, nodeBits, nodeBits-1)
	case mesh != s.mesh && len(s.indexes) > 0:
		return precondition("set the cluster's pools: mesh pool %s is in use by %d nodes and cannot become %s", s.mesh, len(s.indexes), mesh)
	case ula != s.ula && (len(s.indexes) > 0 || len(s.networks) > 0):
		return precondition("set the cluster's pools: IPv6 prefix %q is in use by networks or nodes and cannot become %q", s.ula, c.UlaPrefix)
	}
	for i, p := range overlay {
		switch {
		case p.Overlaps(mesh):
			return invalid("set the cluster's pools: overlay pool %s and mesh pool %s overlap: choose separate ranges", p, mesh)
		case bits < p.Bits():
			return invalid("set the cluster's pools: subnet size /%d does not fit overlay pool %s: choose %d..29", bits, p, p.Bits())
		}
		for _, q := range overlay[:i] {
			if p.Overlaps(q) {
				return invalid("set the cluster's pools: overlay pools %s and %s overlap: choose separate ranges", q, p)
			}
		}
	}
	old := *s
	s.j.Add(func() {
		s.level, s.overlay, s.mesh, s.ula, s.bits = old.level, old.overlay, old.mesh, old.ula, old.bits
	})
	s.level, s.overlay, s.mesh, s.ula, s.bits = max(1, c.FeatureLevel), overlay, mesh, ula, bits
	if old.level < api.LevelNetworks && s.level >= api.LevelNetworks {
		for _, p := range s.pools { // those of the versions before may grow now; none of them was told not to
			p.grows = true
			s.j.Add(func() { p.grows = false })
		}
	}
	return nil
}

// overlayPools are what networks are cut from.
func overlayPools(c *api.ClusterRecord) ([]netip.Prefix, error) {
	all := c.OverlayPools
	if len(all) == 0 || c.FeatureLevel < api.LevelNetworks {
		all = []string{c.OverlayPool}
	}
	if all[0] != c.OverlayPool {
		return nil, invalid("set the cluster's pools: the first of the overlay pools %v is not %s", all, c.OverlayPool)
	}
	var out []netip.Prefix
	for _, text := range all {
		p, err := parsePool("overlay", text)
		if err != nil {
			return nil, err
		}
		out = append(out, p)
	}
	return out, nil
}

func parsePool(what, text string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(text)
	if err != nil || !p.Addr().Is4() || p != p.Masked() || p.Bits() < 8 {
		return netip.Prefix{}, invalid("set the cluster's pools: %s pool %q is not an IPv4 range such as %s", what, text, DefaultOverlayPool)
	}
	return p, nil
}

// NextVNI is stored in a snapshot's header.
func (s *State) NextVNI() uint32 { return s.nextVNI }

// SetNextVNI restores it; 0 leaves the first.
func (s *State) SetNextVNI(v uint32) {
	if v >= firstVNI && v <= maxVNI {
		s.nextVNI = v
	}
}

func invalid(format string, args ...any) error {
	return errdefs.ErrInvalidArgument.WithMessage(fmt.Sprintf(format, args...))
}

func precondition(format string, args ...any) error {
	return errdefs.ErrFailedPrecondition.WithMessage(fmt.Sprintf(format, args...))
}

func conflict(format string, args ...any) error {
	return errdefs.ErrConflict.WithMessage(fmt.Sprintf(format, args...))
}

func exhausted(format string, args ...any) error {
	return errdefs.ErrResourceExhausted.WithMessage(fmt.Sprintf(format, args...))
}

func dataLoss(format string, args ...any) error {
	return errdefs.ErrDataLoss.WithMessage(fmt.Sprintf(format, args...))
}
