package attack

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	specs "github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"skein/agent/dockerapi"
	"skein/agent/dockerapi/dockerapitest"
	"skein/agent/engine"
	"skein/overlay"
	"skein/overlay/crypt"
	skein "skein/runtime"
	"skein/runtime/cgroup"
	"skein/runtime/image"
	"skein/runtime/supervisor"
)

// node is an engine with its API, image store and supervisor, composed as the daemon does; the engine is this process, so that its
// goroutines, descriptors and memory can be counted. Containers have the network of the host.
type node struct {
	t      testing.TB
	dir    string
	images image.Store
	sup    skein.Supervisor
	eng    *engine.Engine
	http   *http.Client
	sock   string
	group  string
}

// noNetwork is a network driver without networks.
type noNetwork struct{}

func (noNetwork) Set(context.Context, overlay.Config) (overlay.Applied, error) {
	return overlay.Applied{}, nil
}
func (noNetwork) AddSandbox(context.Context, overlay.Sandbox) (string, error) { return "", nil }
func (noNetwork) RemoveSandbox(context.Context, string) error                 { return nil }
func (noNetwork) Sandboxes() ([]string, error)                                { return nil, nil }
func (noNetwork) SetBridges(context.Context, []overlay.Bridge) error          { return nil }
func (noNetwork) Facts() (overlay.Facts, error)                               { return overlay.Facts{}, nil }
func (noNetwork) CryptKeys() ([]crypt.Key, error)                             { return nil, nil }
func (noNetwork) CryptKeysChanged() <-chan struct{}                           { return nil }
func (noNetwork) HostRoutes() ([]netip.Prefix, error)                         { return nil, nil }
func (noNetwork) PortFree(string, netip.Addr, uint16) error                   { return nil }
func (noNetwork) PortUnbound(string, netip.Addr, uint16) error                { return nil }
func (noNetwork) SandboxPath(string) string                                   { return "" }
func (noNetwork) SCTP() bool                                                  { return false }
func (noNetwork) PortHolder(string, uint16) (string, int, bool)               { return "", 0, false }

// newNode starts one. The test fails if it leaves a mount or a group behind.
func newNode(t testing.TB) *node {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	n := &node{t: t, dir: t.TempDir()}
	n.group = ownGroups() + "/" + filepath.Base(filepath.Dir(n.dir))
	n.sock = filepath.Join(n.dir, "api.sock")
	log := slog.New(slog.NewTextHandler(io.Discard, nil))
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	var err error
	cfg := supervisor.Config{StateDir: filepath.Join(n.dir, "supervisor"), SocketPath: filepath.Join(n.dir, "s.sock"), Cgroup: n.group, Logger: log}
	if n.sup, err = supervisor.Ensure(ctx, "/proc/self/exe", cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.endSupervisor)
	if n.images, err = image.Open(image.Config{Root: filepath.Join(n.dir, "images"), Logger: log}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.images.Close() })
	n.eng, err = engine.New(engine.Config{StateDir: filepath.Join(n.dir, "engine"), Hostname: "node1", Version: "test", Images: n.images, Supervisor: n.sup,
		Network: noNetwork{}, Logger: log})
	if err != nil {
		t.Fatal(err)
	}
	n.serve()
	return n
}

// serve runs the engine and its API until the test ends.
func (n *node) serve() {
	n.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 2)
	go func() { ended <- n.eng.Run(ctx) }()
	select {
	case <-n.eng.Ready():
	case err := <-ended:
		n.t.Fatalf("the engine ended: %v", err)
	}
	l, err := dockerapi.ListenUnix(n.sock, "")
	if err != nil {
		n.t.Fatal(err)
	}
	h := dockerapi.New(dockerapi.Config{Containers: n.eng, Images: n.eng, Networks: n.eng, Volumes: n.eng, Archives: n.eng, Limits: n.eng, System: n.eng,
		Swarm: dockerapitest.NewCluster()})
	go func() { ended <- dockerapi.Serve(ctx, l, h, nil) }()
	n.http = &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", n.sock)
	}, MaxIdleConnsPerHost: 16}}
	n.t.Cleanup(func() {
		n.http.CloseIdleConnections()
		cancel()
		for range 2 {
			<-ended
		}
	})
}

func (n *node) endSupervisor() {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if err := n.sup.Shutdown(ctx, true); err != nil {
		n.t.Errorf("shutdown: %v", err)
	}
	_ = n.sup.Close()
	parent := filepath.Dir(n.group)
	if err := cgroup.KillTree(parent); err != nil {
		n.t.Errorf("kill groups: %v", err)
	}
	if err := cgroup.RemoveTree(parent); err != nil {
		n.t.Errorf("remove groups: %v", err)
	}
	if b, _ := os.ReadFile("/proc/self/mountinfo"); bytes.Contains(b, []byte(n.dir)) {
		n.t.Errorf("a mount is left below %s", n.dir)
	}
}

// call asks the API and returns status and body.
func (n *node) call(method, path string, body any) (int, string) {
	n.t.Helper()
	var r io.Reader
	ct := "application/json"
	switch b := body.(type) {
	case nil:
		ct = ""
	case io.Reader:
		r, ct = b, "application/x-tar"
	default:
		raw, err := json.Marshal(b)
		if err != nil {
			n.t.Fatal(err)
		}
		r = bytes.NewReader(raw)
	}
	req, err := http.NewRequest(method, "http://d"+path, r)
	if err != nil {
		n.t.Fatal(err)
	}
	if ct != "" {
		req.Header.Set("Content-Type", ct)
	}
	resp, err := n.http.Do(req)
	if err != nil {
		n.t.Fatalf("%s %s: %v", method, path, err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 64<<20))
	if err != nil {
		return resp.StatusCode, string(b) + err.Error()
	}
	return resp.StatusCode, string(b)
}

// must is call that wants success.
func (n *node) must(method, path string, body any) string {
	n.t.Helper()
	code, text := n.call(method, path, body)
	if code >= 400 {
		n.t.Fatalf("%s %s: %d %s", method, path, code, text)
	}
	return text
}

// pings measures, until the test or stop ends it, how long the API takes to answer; stop returns the longest.
func (n *node) pings() (stop func() time.Duration) {
	ctx, cancel := context.WithCancel(n.t.Context())
	longest := make(chan time.Duration, 1)
	go func() {
		var most time.Duration
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for ctx.Err() == nil {
			begun := time.Now()
			resp, err := n.http.Get("http://d/_ping")
			if err != nil {
				most = time.Hour
				break
			}
			resp.Body.Close()
			most = max(most, time.Since(begun))
			<-tick.C
		}
		longest <- most
	}()
	return func() time.Duration {
		cancel()
		return <-longest
	}
}

// entry is a file of an archive: Linkname of a regular file is its content.
func entry(typ byte, name, arg string) tar.Header {
	return tar.Header{Typeflag: typ, Name: name, Linkname: arg, Mode: 0o755}
}

// tarOf makes an archive.
func tarOf(t testing.TB, hs ...tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range hs {
		data := ""
		if h.Typeflag == tar.TypeReg {
			data, h.Linkname = h.Linkname, ""
			h.Size = int64(len(data))
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// program is the layer with the tests' program at /inside and a few directories.
func program(t testing.TB) []byte {
	t.Helper()
	bin, err := os.ReadFile(inside(t))
	if err != nil {
		t.Fatal(err)
	}
	return tarOf(t, entry(tar.TypeDir, "etc/", ""), entry(tar.TypeDir, "tmp/", ""), entry(tar.TypeReg, "inside", string(bin)))
}

// archive is what `docker save` would write of an image of these layers.
func archive(t testing.TB, tags []string, cfg any, layers ...[]byte) []byte {
	t.Helper()
	raw, err := json.Marshal(cfg)
	if err != nil {
		t.Fatal(err)
	}
	files := []tar.Header{entry(tar.TypeReg, digest.FromBytes(raw).Encoded()+".json", string(raw))}
	m := map[string]any{"Config": files[0].Name, "RepoTags": tags}
	var names []string
	for i, l := range layers {
		names = append(names, fmt.Sprintf("%d/layer.tar", i))
		files = append(files, entry(tar.TypeReg, names[i], string(l)))
	}
	m["Layers"] = names
	doc, err := json.Marshal([]any{m})
	if err != nil {
		t.Fatal(err)
	}
	return tarOf(t, append(files, entry(tar.TypeReg, "manifest.json", string(doc)))...)
}

// imageConfig describes an image of the layers for this machine.
func imageConfig(c ocispec.ImageConfig, layers ...[]byte) ocispec.Image {
	if c.Entrypoint == nil {
		c.Entrypoint = []string{"/inside"}
	}
	img := ocispec.Image{Platform: ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH}, Config: c}
	img.RootFS.Type = "layers"
	for _, l := range layers {
		img.RootFS.DiffIDs = append(img.RootFS.DiffIDs, digest.FromBytes(l))
	}
	return img
}

// load makes the image name of the program and further layers.
func (n *node) load(name string, c ocispec.ImageConfig, layers ...[]byte) {
	n.t.Helper()
	layers = append([][]byte{program(n.t)}, layers...)
	out := n.must("POST", "/images/load", bytes.NewReader(archive(n.t, []string{name + ":latest"}, imageConfig(c, layers...), layers...)))
	if !strings.Contains(out, "Loaded image: "+name) {
		n.t.Fatalf("load %s: %s", name, out)
	}
}

// create makes a container of the image; host is its HostConfig.
func (n *node) create(name, img string, host map[string]any, args ...string) string {
	n.t.Helper()
	if host == nil {
		host = map[string]any{}
	}
	if host["NetworkMode"] == nil {
		host["NetworkMode"] = "host"
	}
	n.must("POST", "/containers/create?name="+name, map[string]any{"Image": img, "Cmd": args, "HostConfig": host})
	return name
}

// run makes and starts a container.
func (n *node) run(name, img string, host map[string]any, args ...string) string {
	n.t.Helper()
	n.must("POST", "/containers/"+n.create(name, img, host, args...)+"/start", nil)
	return name
}

// inspect returns the container's JSON.
func (n *node) inspect(name string) map[string]any {
	n.t.Helper()
	var m map[string]any
	if err := json.Unmarshal([]byte(n.must("GET", "/containers/"+name+"/json", nil)), &m); err != nil {
		n.t.Fatal(err)
	}
	return m
}

// waitEnd waits for the container's end and returns its exit code.
func (n *node) waitEnd(name string) int {
	n.t.Helper()
	var out struct{ StatusCode int }
	if err := json.Unmarshal([]byte(n.must("POST", "/containers/"+name+"/wait", nil)), &out); err != nil {
		n.t.Fatal(err)
	}
	return out.StatusCode
}

// output is what the container has written.
func (n *node) output(name string) string {
	n.t.Helper()
	return n.must("GET", "/containers/"+name+"/logs?stdout=1&stderr=1", nil)
}

// eventually waits for a condition, generously.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	limit := time.Now().Add(30 * time.Second)
	for !ok() {
		if time.Now().After(limit) {
			t.Fatalf("%s: not within 30 s", what)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// manifestOf is the manifest of config and layers as their bytes say.
func manifestOf(config []byte, layers ...[]byte) ocispec.Manifest {
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: digest.FromBytes(config), Size: int64(len(config))}}
	for _, l := range layers {
		m.Layers = append(m.Layers, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromBytes(l), Size: int64(len(l))})
	}
	return m
}

// exec makes an additional process and returns its id.
func (n *node) exec(name string, args ...string) string {
	n.t.Helper()
	var out struct{ ID string }
	body := n.must("POST", "/containers/"+name+"/exec", map[string]any{"Cmd": args, "AttachStdout": true, "AttachStderr": true})
	if err := json.Unmarshal([]byte(body), &out); err != nil {
		n.t.Fatal(err)
	}
	return out.ID
}

// startExec starts it in the background.
func (n *node) startExec(id string) {
	n.t.Helper()
	n.must("POST", "/exec/"+id+"/start", map[string]any{"Detach": true})
}

// appears waits for a path in a container.
func (n *node) appears(name, path string) {
	n.t.Helper()
	eventually(n.t, path+" in "+name, func() bool {
		code, _ := n.call("HEAD", "/containers/"+name+"/archive?path="+url.QueryEscape(path), nil)
		return code == http.StatusOK
	})
}
