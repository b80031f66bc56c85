package transport

import (
	"context"
	"sync"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"

	"skein/manager/api"
)

// maxWorkerStreams bounds the calls that a worker, or one address without certificate, has under way: a session, a renewal, and a few that
// are ending. Each may hold a message of api.MaxMessageBytes before anybody can ask whether it is allowed.
const maxWorkerStreams = 32

// streamCount counts the calls under way of peers that are no managers.
type streamCount struct {
	mu   sync.Mutex
	open map[string]int // by node, or by address
}

// admit implements tap.ServerInHandle: it is asked before anything of a call is read.
func (s *streamCount) admit(ctx context.Context, _ *tap.Info) (context.Context, error) {
	who, bounded := streamOwner(ctx)
	if !bounded {
		return ctx, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.open[who] >= maxWorkerStreams {
		return nil, status.Errorf(codes.ResourceExhausted, "%d calls of this node are under way already", maxWorkerStreams)
	}
	s.open[who]++
	context.AfterFunc(ctx, func() { // the call's context ends with it
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.open[who]--; s.open[who] <= 0 {
			delete(s.open, who)
		}
	})
	return ctx, nil
}

func streamOwner(ctx context.Context) (who string, bounded bool) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return "", true
	}
	if info, ok := p.AuthInfo.(credentials.TLSInfo); ok && len(info.State.PeerCertificates) > 0 {
		if id, err := api.IdentityOf(info.State.PeerCertificates[0]); err == nil {
			return id.NodeID, id.Role != api.RoleManager
		}
	}
	return hostOf(p.Addr), true
}
