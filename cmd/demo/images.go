package demo

import (
	"context"
	_ "embed" // the web app's source
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"skein/runtime/image"
	"skein/runtime/image/registry"
)

//go:embed webapp/main.go
var webappSource []byte

// versions of the web app, oldest first.
var versions = []string{"v1", "v2"}

// images is the demo's registry and what it serves.
type images struct {
	server *http.Server
	served chan error
	host   string // host:port
}

// compile builds the web app as one static program per version.
func compile(ctx context.Context) (map[string][]byte, error) {
	goTool, err := exec.LookPath("go")
	if err != nil {
		return nil, errors.New("the demo compiles a small web app and finds no Go toolchain: put `go` into PATH")
	}
	dir, err := os.MkdirTemp("", "skein-demo-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	if err := os.WriteFile(filepath.Join(dir, "main.go"), webappSource, 0o600); err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(dir, "go.mod"), []byte("module webapp\n\ngo 1.24\n"), 0o600); err != nil {
		return nil, err
	}
	out := map[string][]byte{}
	for _, v := range versions {
		bin := filepath.Join(dir, "webapp-"+v)
		cmd := exec.CommandContext(ctx, goTool, "build", "-trimpath", "-ldflags", "-s -w -X main.version="+v, "-o", bin, ".")
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=", "GO111MODULE=on", "GOWORK=off")
		if msg, err := cmd.CombinedOutput(); err != nil {
			return nil, fmt.Errorf("compile the web app: %w: %s", err, msg)
		}
		if out[v], err = os.ReadFile(bin); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// serveImages starts a registry on addr with the programs as images web:VERSION.
func serveImages(addr string, programs map[string][]byte) (*images, error) {
	reg, err := registry.New(registry.Config{})
	if err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", net.JoinHostPort(addr, "0"))
	if err != nil {
		return nil, fmt.Errorf("registry: %w", err)
	}
	m := &images{host: l.Addr().String(), served: make(chan error, 1)}
	for v, bin := range programs {
		art, err := image.FromBinary("/webapp", bin, ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH}, ocispec.ImageConfig{
			ExposedPorts: map[string]struct{}{"8080/tcp": {}}, User: "65534:65534",
		})
		if err == nil {
			_, err = reg.Put("web:"+v, art.MediaType, art.Manifest, art.Blobs()...)
		}
		if err != nil {
			l.Close()
			return nil, fmt.Errorf("image web:%s: %w", v, err)
		}
	}
	m.server = &http.Server{Handler: reg, ReadHeaderTimeout: 10 * time.Second}
	go func() { m.served <- m.server.Serve(l) }()
	return m, nil
}

func (m *images) ref(version string) string { return m.host + "/web:" + version }

func (m *images) close() {
	_ = m.server.Close()
	<-m.served
}
