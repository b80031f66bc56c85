package dispatcher

import (
	"strconv"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"skein/manager/api"
)

// leaderTrailer names the leader's address to an agent that asked a follower.
const leaderTrailer = "skein-leader"

// spreadTrailer tells an agent, where no leader is known, over how many milliseconds all agents had best spread their next attempts.
const (
	spreadTrailer = "skein-spread-millis"
	spreadPerNode = 500 * time.Microsecond // 2,000 attempts a second on each manager
	spreadMax     = 4 * time.Second        // a new leader has given a node up after its grace
)

type sessionStream = grpc.BidiStreamingServer[api.AgentMessage, api.ManagerMessage]

// Front is the gRPC service of a manager's whole life: it hands sessions to the dispatcher of the current term, and sends agents to the
// leader while this manager is a follower.
type Front struct {
	api.UnimplementedDispatcherServer
	leader  func() string
	nodes   func() int // may be nil
	current atomic.Pointer[Dispatcher]
}

// NewFront returns a service without a dispatcher. leader returns the address of the leader, or "" when it is not known; nodes counts the
// cluster's nodes, and may be nil.
func NewFront(leader func() string, nodes func() int) *Front {
	return &Front{leader: leader, nodes: nodes}
}

// Set makes d, of a new term, serve from now on; nil: this manager is a follower.
func (f *Front) Set(d *Dispatcher) { f.current.Store(d) }

// Current is the dispatcher of this term, nil on a follower.
func (f *Front) Current() *Dispatcher { return f.current.Load() }

// Hint passes a suspicion on; followers ignore it.
func (f *Front) Hint(nodeID string) {
	if d := f.current.Load(); d != nil {
		d.Hint(nodeID)
	}
}

// Session implements api.DispatcherServer.
func (f *Front) Session(stream sessionStream) error {
	var err error
	if d := f.current.Load(); d != nil {
		err = d.Session(stream)
		if !isTermEnd(err) {
			return api.ToGRPC(err)
		}
	} else {
		err = api.Errorf(errdefs.ErrFailedPrecondition, "this manager is not the leader: sessions belong to the leader")
	}
	if addr := f.leader(); addr != "" {
		stream.SetTrailer(metadata.Pairs(leaderTrailer, addr))
	} else if f.nodes != nil {
		spread := min(time.Duration(f.nodes())*spreadPerNode, spreadMax)
		stream.SetTrailer(metadata.Pairs(spreadTrailer, strconv.FormatInt(spread.Milliseconds(), 10)))
	}
	return api.ToGRPC(err)
}
