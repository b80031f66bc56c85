package consensus

import (
	"context"
	"io"
	"log/slog"
	"net"

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

// Accept implements hclog.SinkAdapter. Raft's errors are mostly other managers that are away: warnings to us.
func (s sink) Accept(_ string, level hclog.Level, msg string, args ...any) {
	to := slog.LevelDebug
	switch level {
	case hclog.Warn:
		to = slog.LevelInfo
	case hclog.Error:
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
