package agent

import (
	"context"

	"google.golang.org/grpc"

	"skein/manager/api"
)

// LogSource reads the logs of tasks on this node; agent/engine implements it.
type LogSource interface {
	// TaskLogs calls emit for each line that the request asks for, in order, and returns when there are no more, or when ctx or emit
	// ends it. An unknown task is a not-found error.
	TaskLogs(ctx context.Context, req *api.TaskLogsRequest, emit func(*api.LogChunk) error) error
}

// NetChecker compares this node's networks in the kernel with the record; cmd/daemon implements it.
type NetChecker interface {
	CheckNetworks(ctx context.Context, repair bool) (*api.NetCheckNode, error)
}

// maxLogLine is the longest line that crosses the wire in one chunk; longer ones are cut into several by the source.
const maxLogLine = 1 << 20

// Server answers managers about this node. Who may call it is decided by authz, before.
type Server struct {
	api.UnimplementedAgentServer
	logs LogSource
	net  NetChecker
}

// NewServer returns the node's api.AgentServer. Without net, networks are not compared.
func NewServer(logs LogSource, net NetChecker) *Server { return &Server{logs: logs, net: net} }

// CheckNetworks compares this node's networks with the record.
func (s *Server) CheckNetworks(ctx context.Context, r *api.NetCheckRequest) (*api.NetCheckNode, error) {
	if s.net == nil {
		return s.UnimplementedAgentServer.CheckNetworks(ctx, r)
	}
	out, err := s.net.CheckNetworks(ctx, r.Repair)
	return out, api.ToGRPC(err)
}

// Ping shows that this node's daemon runs.
func (s *Server) Ping(context.Context, *api.Empty) (*api.Empty, error) { return &api.Empty{}, nil }

// TaskLogs streams a task's log lines.
func (s *Server) TaskLogs(req *api.TaskLogsRequest, stream grpc.ServerStreamingServer[api.LogChunk]) error {
	err := s.logs.TaskLogs(stream.Context(), req, func(c *api.LogChunk) error {
		for len(c.Line) > maxLogLine {
			if err := stream.Send(&api.LogChunk{Time: c.Time, Stream: c.Stream, Line: c.Line[:maxLogLine]}); err != nil {
				return err
			}
			c = &api.LogChunk{Time: c.Time, Stream: c.Stream, Line: c.Line[maxLogLine:]}
		}
		return stream.Send(c)
	})
	return api.ToGRPC(err)
}
