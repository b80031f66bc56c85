package store

import (
	"fmt"
	"strings"

	"github.com/containerd/errdefs"

	"skein/manager/api"
)

// Kinds of the errors transactions are refused with.
var (
	errInvalid      = errdefs.ErrInvalidArgument
	errNotFound     = errdefs.ErrNotFound
	errExists       = errdefs.ErrAlreadyExists
	errConflict     = errdefs.ErrConflict
	errPrecondition = errdefs.ErrFailedPrecondition
	errDenied       = errdefs.ErrPermissionDenied
	errDataLoss     = errdefs.ErrDataLoss
)

// LevelError says that an entry or snapshot was written by a newer version of Skein. Whoever applies must stop the process: going on
// would let this manager's state part from the others'.
type LevelError struct {
	What          string // "log entry 17", "snapshot"
	Format, Level uint32
	Known         uint32 // highest level of this manager
}

func (e *LevelError) Error() string {
	return fmt.Sprintf("%s has format %d and feature level %d, this version of skein reads format %d and level %d: start a newer version on this node",
		e.What, e.Format, e.Level, api.FormatV1, e.Known)
}

// Unimplemented makes it an errdefs kind.
func (e *LevelError) NotImplemented() {}

// PartialError is the result of a transaction that was applied except for some items of its vectors (placements, deletions of tasks),
// which were refused alone.
type PartialError struct {
	Items []ItemError
}

// ItemError is one refused item.
type ItemError struct {
	TaskID string
	Err    error
}

func (e *PartialError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d items refused", len(e.Items))
	for i, it := range e.Items {
		if i == 3 {
			fmt.Fprintf(&b, "; and %d more", len(e.Items)-i)
			break
		}
		fmt.Fprintf(&b, "; task %s: %v", it.TaskID, it.Err)
	}
	return b.String()
}

// Unwrap gives the items' errors, so that their kinds can be tested for.
func (e *PartialError) Unwrap() []error {
	out := make([]error, len(e.Items))
	for i, it := range e.Items {
		out[i] = it.Err
	}
	return out
}
