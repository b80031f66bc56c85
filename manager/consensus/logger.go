package consensus

import (
	"context"
	"io"
	"log/slog"
	"net"
	"slices"
	"strings"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
)

// newLogger gives raft a logger that ends in ours.
func newLogger(log *slog.Logger) hclog.Logger {
	l := hclog.NewInterceptLogger(&hclog.LoggerOptions{Name: "raft", Level: hclog.Debug, Output: io.Discard})
	l.RegisterSink(sink{log})
	return l
}

type sink struct{ log *slog.Logger }

// retries are raft's words for each failed attempt to reach a manager that is away, several a second. The Observer has one line when it
// goes and one when it is back.
var retries = []string{
	"failed to start pipeline replication to", "failed to appendEntries to", "failed to heartbeat to", "failed to pipeline appendEntries",
	"failed to send snapshot to", "failed to contact", "failed to make requestVote RPC", "Election timeout reached, restarting election",
	"pre-vote: ", "rejecting pre-vote request", "rejecting vote request",
}

// Accept implements hclog.SinkAdapter. What is left of raft's errors is mostly this manager's own trouble: warnings to us.
func (s sink) Accept(_ string, level hclog.Level, msg string, args ...any) {
	to := slog.LevelDebug
	switch {
	case slices.ContainsFunc(retries, func(r string) bool { return strings.HasPrefix(msg, r) }):
	case level == hclog.Warn:
		to = slog.LevelInfo
	case level == hclog.Error:
		to = slog.LevelWarn
	}
	if s.log.Enabled(context.Background(), to) {
		s.log.Log(context.Background(), to, "raft: "+msg, args...)
	}
}

// advertised makes a listener on any address report the one others dial: raft tells it to them.
type advertised struct {
	raft.StreamLayer
	addr string
}

func (a advertised) Addr() net.Addr { return address(a.addr) }

type address string

func (address) Network() string  { return "tcp" }
func (a address) String() string { return string(a) }
