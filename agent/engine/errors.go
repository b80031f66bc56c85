package engine

import (
	"fmt"

	cerrdefs "github.com/containerd/errdefs"
)

// kindError is an error with docker's text and a kind of errdefs, which would otherwise have to stand in the text.
type kindError struct {
	kind error
	msg  string
}

func (k kindError) Error() string { return k.msg }

// Unwrap makes errors.Is find the kind.
func (k kindError) Unwrap() error { return k.kind }

func errf(kind error, format string, args ...any) error {
	return kindError{kind, fmt.Sprintf(format, args...)}
}

func notFound(format string, args ...any) error { return errf(cerrdefs.ErrNotFound, format, args...) }
func conflict(format string, args ...any) error { return errf(cerrdefs.ErrConflict, format, args...) }
func invalid(format string, args ...any) error {
	return errf(cerrdefs.ErrInvalidArgument, format, args...)
}

// errDenied is docker's 403.
var errDenied = cerrdefs.ErrPermissionDenied

func notBuilt(format string, args ...any) error {
	return errf(cerrdefs.ErrNotImplemented, format, args...)
}
