package image

import (
	"context"
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
	errClosed    = fmt.Errorf("image store is closed: %w", errdefs.ErrUnavailable)
	errPlainHTTP = errors.New("server gave HTTP response to HTTPS client")
	errStalled   = errors.New("no data for too long")
)

// diskError gives a full disk its kind, and names the directory.
func diskError(root string, err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fmt.Errorf("disk of %s is full: %w: free some space, or remove images that are not needed: %w", root, err, errdefs.ErrResourceExhausted)
	}
	return err
}

// explain turns what went wrong while talking to a registry into a kind, a cause and a fix.
func explain(host string, err error) error {
	var status remoteerrors.ErrUnexpectedStatus
	var op *net.OpError
	var dns *net.DNSError
	switch {
	case err == nil:
		return nil
	case errors.Is(err, context.Canceled), errors.Is(err, errClosed):
		return err
	case isPlainHTTP(err):
		return fmt.Errorf("registry %s speaks plain HTTP and is not declared insecure: start the daemon with --insecure-registry %s if that is meant: %w",
			host, host, errdefs.ErrFailedPrecondition)
	case strings.Contains(err.Error(), "x509:") || strings.Contains(err.Error(), "certificate"):
		return fmt.Errorf("registry %s has a certificate that is not trusted: %v: install its CA, or start the daemon with --insecure-registry %s: %w",
			host, root(err), host, errdefs.ErrFailedPrecondition)
	case errors.Is(err, docker.ErrInvalidAuthorization), statusIs(err, &status, http.StatusUnauthorized):
		return fmt.Errorf("registry %s refuses access: %v: log in with `docker login %s`, or check the name: %w", host, root(err), host, errdefs.ErrUnauthenticated)
	case statusIs(err, &status, http.StatusForbidden):
		return fmt.Errorf("registry %s denies access with these credentials: %v: %w", host, root(err), errdefs.ErrPermissionDenied)
	case statusIs(err, &status, http.StatusTooManyRequests):
		return fmt.Errorf("registry %s limits requests: %v: wait, or log in: %w", host, root(err), errdefs.ErrUnavailable)
	case errors.Is(err, errStalled):
		return fmt.Errorf("registry %s stopped sending: %w: %w", host, err, errdefs.ErrUnavailable)
	case errors.As(err, &dns):
		return fmt.Errorf("registry %s is unreachable: %v: is the name right, and does this machine's DNS know it?: %w", host, dns, errdefs.ErrUnavailable)
	case errors.As(err, &op):
		return fmt.Errorf("registry %s is unreachable: %v: is it running, and is the address right?: %w", host, op, errdefs.ErrUnavailable)
	case errdefs.IsNotFound(err):
		return fmt.Errorf("not found in registry %s: check the name and tag: %w", host, errdefs.ErrNotFound)
	case temporary(err):
		return fmt.Errorf("registry %s answers badly: %v: %w", host, root(err), errdefs.ErrUnavailable)
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
