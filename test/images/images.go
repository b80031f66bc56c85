// Package images builds the programs of long runs and serves them as images, to the nodes of a development cluster.
package images

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"skein/runtime/image"
	"skein/runtime/image/registry"
)

// Build compiles a package without cgo into the file out.
func Build(ctx context.Context, out, pkg string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-ldflags", "-s -w", "-o", out, pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if msg, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build %s: %w: %s", pkg, err, msg)
	}
	return nil
}

// BuildAll compiles packages, by name of the file, into dir, and skein itself unless there is an executable of it already. It returns that.
func BuildAll(ctx context.Context, dir, binary string, programs map[string]string) (skein string, err error) {
	for out, pkg := range programs {
		if err := Build(ctx, filepath.Join(dir, out), pkg); err != nil {
			return "", err
		}
	}
	if binary != "" {
		return binary, nil
	}
	skein = filepath.Join(dir, "skein")
	return skein, Build(ctx, skein, "skein/cmd/skein")
}

// Program is a static executable that becomes an image of one file.
type Program struct {
	Ref  string // name and tag in the registry: "web:v1"
	Path string // in the image: "/webapp"
	File string
	Env  []string
}

// Serve offers the programs at a free port of an address until the server is closed. repo is the registry's host and port.
func Serve(on netip.Addr, programs ...Program) (srv *http.Server, repo string, err error) {
	reg, err := registry.New(registry.Config{})
	if err != nil {
		return nil, "", err
	}
	for _, p := range programs {
		bin, err := os.ReadFile(p.File)
		if err != nil {
			return nil, "", err
		}
		art, err := image.FromBinary(p.Path, bin, ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH}, ocispec.ImageConfig{Env: p.Env})
		if err == nil {
			_, err = reg.Put(p.Ref, art.MediaType, art.Manifest, art.Blobs()...)
		}
		if err != nil {
			return nil, "", err
		}
	}
	l, err := net.Listen("tcp", net.JoinHostPort(on.String(), "0"))
	if err != nil {
		return nil, "", err
	}
	srv = &http.Server{Handler: reg, ReadHeaderTimeout: 10 * time.Second}
	go func() { _ = srv.Serve(l) }() // ends with the server's Close
	return srv, l.Addr().String(), nil
}
