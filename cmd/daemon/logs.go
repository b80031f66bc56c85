package daemon

import (
	"context"
	"time"

	"skein/agent/dockerapi"
	"skein/agent/engine"
	"skein/manager/api"
)

// logSource lets managers read the logs of this node's tasks (agent.LogSource).
type logSource struct{ eng *engine.Engine }

func (s logSource) TaskLogs(ctx context.Context, req *api.TaskLogsRequest, emit func(*api.LogChunk) error) error {
	o := dockerapi.LogOptions{Stdout: req.Stdout, Stderr: req.Stderr, Follow: req.Follow, Since: instant(req.Since), Until: instant(req.Until), Tail: req.Tail}
	return s.eng.TaskLogs(ctx, req.TaskId, o, func(l dockerapi.LogLine) error {
		stream := uint32(1)
		if l.Stderr {
			stream = 2
		}
		line := l.Line
		if n := len(line); n > 0 && line[n-1] == '\n' {
			line = line[:n-1]
		}
		return emit(&api.LogChunk{Time: l.Time.UnixNano(), Stream: stream, Line: line})
	})
}

func instant(nanos int64) time.Time {
	if nanos == 0 {
		return time.Time{}
	}
	return time.Unix(0, nanos)
}
