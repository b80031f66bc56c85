package dockerapi

import (
	"context"
	"errors"
	"net/http"
	"strings"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc/status"

	"skein/manager/api"
)

// ErrNotModified says that a container already is as asked: started, or stopped. Docker's 304.
var ErrNotModified = errdefs.ErrNotModified

// Docker's texts for a node that cannot answer for a cluster. Clients match them.
var (
	// ErrNoSwarm is the answer of a node that belongs to no cluster.
	ErrNoSwarm = errdefs.ErrUnavailable.WithMessage(`This node is not a swarm manager. Use "docker swarm init" or "docker swarm join" to connect this node to swarm and try again.`)
	// ErrNotManager is the answer of a worker.
	ErrNotManager = errdefs.ErrUnavailable.WithMessage(`This node is not a swarm manager. Worker nodes can't be used to view or modify cluster state. Please run this command on a manager node or promote the current node to a manager.`)
	// ErrNotPartOfSwarm is the answer to a leave on a node that belongs to no cluster.
	ErrNotPartOfSwarm = errdefs.ErrUnavailable.WithMessage(`This node is not part of a swarm`)
	// ErrSwarmExists is the answer to an init or join on a node that belongs to a cluster.
	ErrSwarmExists = errdefs.ErrUnavailable.WithMessage(`This node is already part of a swarm. Use "docker swarm leave" to leave this swarm and join another one.`)
)

// statusOf is the one place where an error becomes a status code and a text for the client. gRPC's own words are taken out of the text.
func statusOf(err error) (int, string) {
	var g interface {
		error
		GRPCStatus() *status.Status
	}
	if !errors.As(err, &g) {
		return fromKind(err), err.Error()
	}
	text := strings.Replace(err.Error(), g.Error(), g.GRPCStatus().Message(), 1)
	return fromKind(api.FromGRPC(g)), text
}

func fromKind(err error) int {
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &tooLarge):
		return http.StatusRequestEntityTooLarge
	case errdefs.IsNotModified(err):
		return http.StatusNotModified
	case errdefs.IsNotFound(err):
		return http.StatusNotFound
	case errdefs.IsInvalidArgument(err), errdefs.IsOutOfRange(err), errdefs.IsFailedPrecondition(err):
		return http.StatusBadRequest
	case errdefs.IsConflict(err), errdefs.IsAlreadyExists(err), errdefs.IsAborted(err):
		return http.StatusConflict
	case errdefs.IsUnauthorized(err):
		return http.StatusUnauthorized
	case errdefs.IsPermissionDenied(err):
		return http.StatusForbidden
	case errdefs.IsNotImplemented(err):
		return http.StatusNotImplemented
	case errdefs.IsUnavailable(err), errdefs.IsResourceExhausted(err):
		return http.StatusServiceUnavailable
	case errors.Is(err, context.DeadlineExceeded):
		return http.StatusGatewayTimeout
	}
	return http.StatusInternalServerError
}

func invalid(format string, args ...any) error {
	return api.Errorf(errdefs.ErrInvalidArgument, format, args...)
}

func notFound(format string, args ...any) error {
	return api.Errorf(errdefs.ErrNotFound, format, args...)
}

// notBuilt refuses by name what Skein cannot do yet.
func notBuilt(format string, args ...any) error {
	return api.Errorf(errdefs.ErrNotImplemented, format, args...)
}
