package image

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"syscall"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"
)

var (
	errClosed    = kind(errdefs.ErrUnavailable, "image store is closed")
	errPlainHTTP = errors.New("server gave HTTP response to HTTPS client")
	errStalled   = errors.New("no data for too long")
)

// kindError has a kind for programs without a word of it for people.
type kindError struct {
	error
	kind error
}

func (e kindError) Unwrap() []error { return []error{e.error, e.kind} }

// kind makes an error of a kind of errdefs.
func kind(k error, format string, a ...any) error {
	return kindError{fmt.Errorf(format, a...), k}
}

// diskError gives a full disk its kind, and names the directory.
func diskError(root string, err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return kind(errdefs.ErrResourceExhausted, "disk of %s is full: %w: free some space, or remove images that are not needed", root, err)
	}
	return err
}

// explain turns what went wrong while talking to a registry into a kind, a cause and a fix.
func explain(host string, err error) error {
	var status remoteerrors.ErrUnexpectedStatus
	var op *net.OpError
	var dns *net.DNSError
	var cert *tls.CertificateVerificationError
	var record tls.RecordHeaderError
	var ne net.Error
	switch {
	case err == nil:
		return nil
	case errors.Is(err, context.Canceled), errors.Is(err, errClosed):
		return err
	case isPlainHTTP(err):
		return kind(errdefs.ErrFailedPrecondition, "registry %s speaks plain HTTP and is not declared insecure: start the daemon with --insecure-registry %s if that is meant",
			host, host)
	case errors.As(err, &cert):
		return kind(errdefs.ErrFailedPrecondition, "registry %s has a certificate that is not trusted: %v: install its CA, or start the daemon with --insecure-registry %s",
			host, root(err), host)
	case errors.Is(err, docker.ErrInvalidAuthorization), statusIs(err, &status, http.StatusUnauthorized):
		return kind(errdefs.ErrUnauthenticated, "registry %s refuses access: %v: log in with `docker login %s`, or check the name", host, root(err), host)
	case statusIs(err, &status, http.StatusForbidden):
		return kind(errdefs.ErrPermissionDenied, "registry %s denies access with these credentials: %v", host, root(err))
	case statusIs(err, &status, http.StatusTooManyRequests):
		return kind(errdefs.ErrUnavailable, "registry %s limits requests: %v: wait, or log in", host, root(err))
	case errors.Is(err, errStalled):
		return kind(errdefs.ErrUnavailable, "registry %s stopped sending: %w", host, err)
	case errors.As(err, &record):
		return kind(errdefs.ErrUnavailable, "registry %s speaks neither HTTPS nor HTTP: %v: is the port right?", host, record)
	case errors.As(err, &dns):
		return kind(errdefs.ErrUnavailable, "registry %s is unreachable: %v: is the name right, and does this machine's DNS know it?", host, dns)
	case errors.As(err, &op):
		return kind(errdefs.ErrUnavailable, "registry %s is unreachable: %v: is it running, and is the address right?", host, op)
	case errdefs.IsNotFound(err):
		return kind(errdefs.ErrNotFound, "not found in registry %s: check the name and tag", host)
	case errors.As(err, &ne) && ne.Timeout():
		return kind(errdefs.ErrUnavailable, "registry %s does not answer in time: %v: is it overloaded?", host, root(err))
	case temporary(err):
		return kind(errdefs.ErrUnavailable, "registry %s answers badly: %v", host, root(err))
	}
	return err
}

func isPlainHTTP(err error) bool {
	return errors.Is(err, errPlainHTTP) || strings.Contains(err.Error(), errPlainHTTP.Error())
}

func statusIs(err error, status *remoteerrors.ErrUnexpectedStatus, code int) bool {
	return errors.As(err, status) && status.StatusCode == code
}

// root shows the innermost message only: the outer ones are containerd's way to it.
func root(err error) error {
	for {
		in := errors.Unwrap(err)
		if in == nil {
			return err
		}
		err = in
	}
}

// temporary tells whether the same request may succeed a moment later.
func temporary(err error) bool {
	if err == nil || errors.Is(err, context.Canceled) {
		return false
	}
	var status remoteerrors.ErrUnexpectedStatus
	if errors.As(err, &status) {
		return status.StatusCode >= 500 || status.StatusCode == http.StatusTooManyRequests || status.StatusCode == http.StatusRequestTimeout
	}
	// Timeouts are not among these: the client below has made several attempts already.
	switch {
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE),
		errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF), errors.Is(err, errStalled):
		return true
	}
	return false
}

// wrap prefixes err with the operation and the image, once.
func wrap(op, ref string, err error) error {
	return fmt.Errorf("%s %s: %w", op, ref, err)
}
