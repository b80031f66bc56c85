package api

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Errorf returns an error of the given errdefs kind whose text is exactly the message: docker's texts are part of the contract.
func Errorf(kind error, format string, args ...any) error {
	msg := fmt.Sprintf(format, args...)
	if k, ok := kind.(interface{ WithMessage(string) error }); ok {
		return k.WithMessage(msg)
	}
	return fmt.Errorf("%s: %w", msg, kind)
}

// kinds maps error kinds to codes; the first match wins in both directions.
var kinds = []struct {
	kind error
	code codes.Code
}{
	{context.Canceled, codes.Canceled},
	{context.DeadlineExceeded, codes.DeadlineExceeded},
	{errdefs.ErrInvalidArgument, codes.InvalidArgument},
	{errdefs.ErrNotFound, codes.NotFound},
	{errdefs.ErrAlreadyExists, codes.AlreadyExists},
	{errdefs.ErrPermissionDenied, codes.PermissionDenied},
	{errdefs.ErrUnauthenticated, codes.Unauthenticated},
	{errdefs.ErrConflict, codes.Aborted},
	{errdefs.ErrAborted, codes.Aborted},
	{errdefs.ErrFailedPrecondition, codes.FailedPrecondition},
	{errdefs.ErrResourceExhausted, codes.ResourceExhausted},
	{errdefs.ErrNotImplemented, codes.Unimplemented},
	{errdefs.ErrUnavailable, codes.Unavailable},
	{errdefs.ErrOutOfRange, codes.OutOfRange},
	{errdefs.ErrDataLoss, codes.DataLoss},
	{errdefs.ErrInternal, codes.Internal},
	{errdefs.ErrUnknown, codes.Unknown},
}

// ToGRPC maps an error's kind to a status and keeps its text. An error that is a status already stays as it is.
func ToGRPC(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := err.(interface{ GRPCStatus() *status.Status }); ok {
		return err
	}
	for _, k := range kinds {
		if errors.Is(err, k.kind) {
			return status.Error(k.code, err.Error())
		}
	}
	return status.Error(codes.Unknown, err.Error())
}

// FromGRPC maps a status back to an error of the kind it was made from, with the same text.
func FromGRPC(err error) error {
	if err == nil {
		return nil
	}
	st, ok := status.FromError(err)
	if !ok {
		return err
	}
	for _, k := range kinds {
		if st.Code() == k.code {
			return Errorf(k.kind, "%s", st.Message())
		}
	}
	return Errorf(errdefs.ErrUnknown, "%s", st.Message())
}

// NotDone marks an error of a request that certainly changed nothing: it may be sent again, to whoever leads by then.
func NotDone(err error) error {
	if err == nil {
		return nil
	}
	return notDone{err}
}

// IsNotDone reports whether an error is so marked. The mark does not cross the wire.
func IsNotDone(err error) bool {
	var nd notDone
	return errors.As(err, &nd)
}

type notDone struct{ error }

func (e notDone) Unwrap() error { return e.error }
