package image_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"skein/runtime/image"
	"skein/runtime/image/registry"
)

// front serves a registry through a function that may answer in its stead.
func front(t *testing.T, reg http.Handler, f func(w http.ResponseWriter, r *http.Request) bool) string {
	t.Helper()
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !f(w, r) {
			reg.ServeHTTP(w, r)
		}
	}))
	t.Cleanup(srv.Close)
	return strings.TrimPrefix(srv.URL, "http://")
}

// isBlob tells whether r fetches the blob d.
func isBlob(r *http.Request, d digest.Digest) bool {
	return r.Method == http.MethodGet && strings.HasSuffix(r.URL.Path, "/blobs/"+d.String())
}

func TestHostileRegistry(t *testing.T) {
	reg, _ := newRegistry(t)
	b := threeLayers(t, "gzip")
	b.push(t, reg, "web:v1")
	l := b.manifest.Layers[1]
	for _, c := range []struct {
		name string
		f    func(w http.ResponseWriter, r *http.Request) bool
		kind func(error) bool
		want string
	}{
		{"wrong bytes", func(w http.ResponseWriter, r *http.Request) bool {
			if isBlob(r, l.Digest) {
				w.Write(bytes.Repeat([]byte("x"), int(l.Size)))
			}
			return isBlob(r, l.Digest)
		}, errdefs.IsDataLoss, "served wrong bytes"},
		{"endless body", func(w http.ResponseWriter, r *http.Request) bool {
			if !isBlob(r, l.Digest) {
				return false
			}
			for r.Context().Err() == nil {
				if _, err := w.Write(make([]byte, 4096)); err != nil {
					break
				}
			}
			return true
		}, errdefs.IsDataLoss, "sends more than the"},
		{"other layer", func(w http.ResponseWriter, r *http.Request) bool {
			if isBlob(r, l.Digest) {
				w.Write(b.blobs[1])
			}
			return isBlob(r, l.Digest)
		}, errdefs.IsDataLoss, ""},
		{"layer is missing", func(w http.ResponseWriter, r *http.Request) bool {
			if isBlob(r, l.Digest) {
				http.NotFound(w, r)
			}
			return isBlob(r, l.Digest)
		}, errdefs.IsNotFound, l.Digest.String()},
		{"endless manifest", func(w http.ResponseWriter, r *http.Request) bool {
			if !strings.Contains(r.URL.Path, "/manifests/") {
				return false
			}
			w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
			for r.Method == http.MethodGet && r.Context().Err() == nil {
				if _, err := w.Write(bytes.Repeat([]byte(" "), 4096)); err != nil {
					break
				}
			}
			return true
		}, errdefs.IsInvalidArgument, "longer document"},
		{"5xx for ever", func(w http.ResponseWriter, r *http.Request) bool {
			if isBlob(r, l.Digest) {
				w.WriteHeader(http.StatusBadGateway)
			}
			return isBlob(r, l.Digest)
		}, errdefs.IsUnavailable, "502"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			host := front(t, reg, c.f)
			s, root := newStore(t)
			_, err := s.Pull(testContext(t), host+"/web:v1", image.PullOptions{})
			if err == nil || !c.kind(err) || !strings.Contains(err.Error(), c.want) || !strings.HasPrefix(err.Error(), "pull "+host+"/web:v1: ") {
				t.Errorf("got %v, want %q", err, c.want)
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			openStore(t, root)
			if blobFiles(t, root)+layerDirs(t, root) != 0 {
				t.Error("something is left of a failed pull")
			}
		})
	}
}

func TestHostileManifests(t *testing.T) {
	s, _ := newStore(t)
	d := "sha256:" + strings.Repeat("1", 64)
	desc := func(size int64) map[string]any { return map[string]any{"mediaType": "x", "digest": d, "size": size} }
	for _, c := range []struct {
		name, mediaType string
		body            any
		want            string
	}{
		{"manifest with manifests", ocispec.MediaTypeImageManifest, map[string]any{"config": desc(1), "layers": []any{}, "manifests": []any{desc(1)}}, "manifest with manifests"},
		{"index with layers", ocispec.MediaTypeImageIndex, map[string]any{"layers": []any{desc(1)}, "manifests": []any{desc(1)}}, "index with layers"},
		{"says another type", ocispec.MediaTypeImageManifest, map[string]any{"mediaType": ocispec.MediaTypeImageIndex, "config": desc(1)}, "but was served as"},
		{"unknown type", "application/vnd.example", map[string]any{"config": desc(1)}, "neither an image manifest nor an index"},
		{"schema 1", "application/vnd.docker.distribution.manifest.v1+prettyjws", map[string]any{"fsLayers": []any{}}, "schema 1"},
		{"huge config", ocispec.MediaTypeImageManifest, map[string]any{"config": desc(5 << 20)}, "are allowed"},
		{"negative size", ocispec.MediaTypeImageManifest, map[string]any{"config": desc(-5)}, "negative size"},
		{"no digest", ocispec.MediaTypeImageManifest, map[string]any{"config": map[string]any{"digest": "../../x", "size": 1}}, "digest"},
		{"too many layers", ocispec.MediaTypeImageManifest, map[string]any{"config": desc(1), "layers": make([]struct{}, 128)}, "more than 127 layers"},
		{"empty index", ocispec.MediaTypeImageIndex, map[string]any{"manifests": []any{}}, "no variant"},
		{"no JSON", ocispec.MediaTypeImageManifest, "text", "cannot unmarshal"},
	} {
		t.Run(c.name, func(t *testing.T) {
			body := marshal(t, c.body)
			reg, _ := newRegistry(t)
			host := front(t, reg, func(w http.ResponseWriter, r *http.Request) bool {
				if !strings.Contains(r.URL.Path, "/manifests/") {
					return false
				}
				w.Header().Set("Content-Type", c.mediaType)
				w.Header().Set("Docker-Content-Digest", digest.FromBytes(body).String())
				w.Header().Set("Content-Length", fmt.Sprint(len(body)))
				if r.Method == http.MethodGet {
					w.Write(body)
				}
				return true
			})
			_, err := s.Pull(testContext(t), host+"/web:v1", image.PullOptions{})
			if err == nil || !strings.Contains(err.Error(), c.want) || errdefs.IsUnknown(err) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}

// TestManifestIsItsDigest: by digest or by tag, a manifest that is not what its digest says is not taken, valid as it may be.
func TestManifestIsItsDigest(t *testing.T) {
	reg, _ := newRegistry(t)
	good, evil := build(t, "gzip", tarOf(t, f("x", "1"))), build(t, "gzip", tarOf(t, f("x", "evil")))
	d := good.push(t, reg, "web:v1")
	evil.push(t, reg, "web:v2")
	raw := marshal(t, evil.manifest)
	for _, lies := range []bool{true, false} { // about the digest of what it serves
		host := front(t, reg, func(w http.ResponseWriter, r *http.Request) bool {
			if !strings.Contains(r.URL.Path, "/manifests/") {
				return false
			}
			w.Header().Set("Content-Type", evil.manifest.MediaType)
			w.Header().Set("Content-Length", fmt.Sprint(len(raw)))
			if lies {
				w.Header().Set("Docker-Content-Digest", d.String())
			}
			if r.Method == http.MethodGet {
				w.Write(raw)
			}
			return true
		})
		s, _ := newStore(t)
		for _, ref := range []string{"/web@" + d.String(), "/web:v1@" + d.String(), "/web:v1"} {
			img, err := s.Pull(testContext(t), host+ref, image.PullOptions{})
			if byTag := ref == "/web:v1" && !lies; (err == nil) != byTag {
				t.Errorf("%s, lies %v: got %v %v", ref, lies, img.Target.Digest, err)
			}
		}
	}
}

// TestURLsInManifest: a layer is fetched from the registry that was asked, not from where the manifest points.
func TestURLsInManifest(t *testing.T) {
	var asked atomic.Int32
	other := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { asked.Add(1) }))
	defer other.Close()
	reg, host := newRegistry(t)
	b := build(t, "none", tarOf(t, f("x", "1")))
	b.manifest.Layers[0].MediaType = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
	b.manifest.Layers[0].URLs = []string{other.URL + "/layer"}
	b.push(t, reg, "web:v1")
	s, _ := newStore(t)
	if _, err := s.Pull(testContext(t), host+"/web:v1", image.PullOptions{}); err != nil {
		t.Error(err)
	}
	if asked.Load() != 0 {
		t.Error("the manifest's address was asked")
	}
}

func TestResume(t *testing.T) {
	reg, _ := newRegistry(t)
	b := build(t, "none", tarOf(t, f("x", strings.Repeat("0123456789", 200_000))))
	b.push(t, reg, "web:v1")
	l := b.manifest.Layers[0]
	var served atomic.Int64
	var cuts atomic.Int32
	host := front(t, reg, func(w http.ResponseWriter, r *http.Request) bool {
		if !isBlob(r, l.Digest) {
			return false
		}
		if cuts.Add(1) > 3 {
			return false
		}
		// Breaks off after half a megabyte.
		reg.ServeHTTP(&cutWriter{ResponseWriter: w, left: 512 << 10, served: &served}, r)
		panic(http.ErrAbortHandler)
	})
	s, _ := newStore(t)
	if _, err := s.Pull(testContext(t), host+"/web:v1", image.PullOptions{}); err != nil {
		t.Fatal(err)
	}
	if cuts.Load() < 3 || served.Load() > 2<<20 {
		t.Errorf("%d requests, %d bytes before the last", cuts.Load(), served.Load())
	}
}

type cutWriter struct {
	http.ResponseWriter
	left   int
	served *atomic.Int64
}

func (w *cutWriter) Write(b []byte) (int, error) {
	n := min(len(b), w.left)
	w.left -= n
	w.served.Add(int64(n))
	if n < len(b) {
		w.ResponseWriter.Write(b[:n])
		return n, http.ErrAbortHandler
	}
	return w.ResponseWriter.Write(b)
}

func TestParallelPullsShare(t *testing.T) {
	reg, _ := newRegistry(t)
	b := threeLayers(t, "gzip")
	b.push(t, reg, "web:v1")
	b.push(t, reg, "web:v2")
	var mu sync.Mutex
	asked := map[string]int{}
	host := front(t, reg, func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/") {
			mu.Lock()
			defer mu.Unlock()
			asked[r.URL.Path]++
			time.Sleep(20 * time.Millisecond) // the registry's speed
		}
		return false
	})
	s, _ := newStore(t)
	ctx := testContext(t)
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			var seen atomic.Int32
			if _, err := s.Pull(ctx, fmt.Sprintf("%s/web:v%d", host, 1+i%2), image.PullOptions{Progress: func(image.Progress) { seen.Add(1) }}); err != nil {
				t.Error(err)
			}
			if seen.Load() == 0 {
				t.Error("no progress")
			}
		})
	}
	// One that gives up does not spoil the others.
	gone, cancel := context.WithCancel(ctx)
	wg.Go(func() { s.Pull(gone, host+"/web:v1", image.PullOptions{}) })
	cancel()
	wg.Wait()
	if len(asked) != 4 {
		t.Errorf("asked for %v", asked)
	}
	for p, n := range asked {
		if n != 1 {
			t.Errorf("%s: %d times", p, n)
		}
	}
}

func TestCancelledPullEnds(t *testing.T) {
	reg, _ := newRegistry(t)
	b := threeLayers(t, "gzip")
	b.push(t, reg, "web:v1")
	reached, ended := make(chan struct{}, 10), make(chan struct{}, 10)
	host := front(t, reg, func(w http.ResponseWriter, r *http.Request) bool {
		if !isBlob(r, b.manifest.Layers[0].Digest) {
			return false
		}
		reached <- struct{}{}
		w.Write([]byte("x"))
		http.NewResponseController(w).Flush()
		<-r.Context().Done()
		ended <- struct{}{}
		return true
	})
	s, _ := newStore(t)
	ctx, cancel := context.WithCancel(testContext(t))
	go func() { <-reached; cancel() }()
	if _, err := s.Pull(ctx, host+"/web:v1", image.PullOptions{}); err == nil {
		t.Error("no error")
	}
	select {
	case <-ended:
	case <-time.After(10 * time.Second):
		t.Error("the download goes on although nobody waits")
	}
}

func TestErrors(t *testing.T) {
	t.Parallel()
	s, _ := newStore(t)
	ctx := testContext(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	down := l.Addr().String()
	l.Close()
	reg, host := newRegistry(t)
	build(t, "gzip", tarOf(t, f("x", "1"))).push(t, reg, "web:v1")
	for _, c := range []struct {
		ref, want string
		kind      func(error) bool
	}{
		{down + "/web:v1", "registry " + down + " is unreachable: dial tcp " + down + ": connect: connection refused: is it running, and is the address right?", errdefs.IsUnavailable},
		{host + "/web:v9", "pull " + host + "/web:v9: not found in registry " + host + ": check the name and tag", errdefs.IsNotFound},
		{host + "/none", "pull " + host + "/none:latest: not found in registry " + host, errdefs.IsNotFound},
		{host + "/web@sha256:" + strings.Repeat("1", 64), "not found in registry", errdefs.IsNotFound},
		{host + "/UPPER", "write [HOST[:PORT]/]NAME[:TAG][@DIGEST] in lower case", errdefs.IsInvalidArgument},
		{"", "image name", errdefs.IsInvalidArgument},
	} {
		_, err := s.Pull(ctx, c.ref, image.PullOptions{})
		if err == nil || !c.kind(err) || !strings.Contains(err.Error(), c.want) || strings.HasSuffix(err.Error(), ": not found") {
			t.Errorf("Pull(%q): got %v, want %q", c.ref, err, c.want)
		}
	}
	if _, _, err := s.Resolve(ctx, down+"/web", nil); !errdefs.IsUnavailable(err) {
		t.Errorf("Resolve: %v", err)
	}
	if _, err := s.Pull(ctx, host+"/web:v1", image.PullOptions{Platform: "a/b/c/d"}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("platform: %v", err)
	}
	for _, bad := range []string{"nope", "0123", "a/b@sha256:" + strings.Repeat("1", 64)} {
		if _, err := s.Get(ctx, bad); !errdefs.IsNotFound(err) {
			t.Errorf("Get(%q): got %v, want not found", bad, err)
		}
	}
	if _, _, err := s.Remove(ctx, "nope", false); !errdefs.IsNotFound(err) {
		t.Errorf("Remove: %v", err)
	}
}

// tokens protects a registry as Docker Hub does; it wants user "u" with password "p".
func tokens(t *testing.T, reg http.Handler, realm func(host string) string) string {
	return front(t, reg, func(w http.ResponseWriter, r *http.Request) bool {
		switch {
		case r.URL.Path == "/token":
			r.ParseForm()
			u, p, _ := r.BasicAuth()
			if r.Form.Get("password") != "" {
				u, p = r.Form.Get("username"), r.Form.Get("password")
			}
			if u != "u" || p != "p" {
				w.WriteHeader(http.StatusUnauthorized)
				return true
			}
			json.NewEncoder(w).Encode(map[string]any{"token": "good", "access_token": "good", "expires_in": 60})
			return true
		case r.Header.Get("Authorization") == "Bearer good":
			return false
		}
		w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s",service="s",scope="repository:web:pull"`, realm(r.Host)))
		w.WriteHeader(http.StatusUnauthorized)
		return true
	})
}

func TestAuth(t *testing.T) {
	reg, _ := newRegistry(t)
	build(t, "gzip", tarOf(t, f("x", "1"))).push(t, reg, "web:v1")
	host := tokens(t, reg, func(h string) string { return "http://" + h + "/token" })
	s, _ := newStore(t)
	ctx := testContext(t)
	for _, a := range []*image.Auth{nil, {Username: "u", Password: "wrong"}} {
		_, err := s.Pull(ctx, host+"/web:v1", image.PullOptions{Auth: a})
		if !errdefs.IsUnauthorized(err) || !strings.Contains(err.Error(), "docker login "+host) {
			t.Errorf("%+v: got %v, want unauthorized", a, err)
		}
	}
	for _, a := range []*image.Auth{{Username: "u", Password: "p"}, {RegistryToken: "good"}} {
		if _, err := s.Pull(ctx, host+"/web:v1", image.PullOptions{Auth: a}); err != nil {
			t.Errorf("%+v: %v", a, err)
		}
	}
	if _, _, err := s.Resolve(ctx, host+"/web:v1", &image.Auth{Username: "u", Password: "p"}); err != nil {
		t.Error(err)
	}
}

// TestRedirectLosesCredentials: the host that blobs are served from gets no credential of the registry, nor when it goes on to redirect to
// itself: net/http then adds again what the first request had, since to it another port is the same host.
func TestRedirectLosesCredentials(t *testing.T) {
	for hops := range 3 {
		reg, _ := newRegistry(t)
		b := build(t, "gzip", tarOf(t, f("x", "1")))
		b.push(t, reg, "web:v1")
		var leaked, served atomic.Int32
		cdn := front(t, reg, func(w http.ResponseWriter, r *http.Request) bool {
			served.Add(1)
			if r.Header.Get("Authorization") != "" || r.Header.Get("Cookie") != "" {
				leaked.Add(1)
			}
			if n, _ := strconv.Atoi(r.URL.Query().Get("n")); n < hops {
				http.Redirect(w, r, fmt.Sprintf("%s?n=%d", r.URL.Path, n+1), http.StatusTemporaryRedirect)
				return true
			}
			return false
		})
		host := front(t, reg, func(w http.ResponseWriter, r *http.Request) bool {
			if u, p, _ := r.BasicAuth(); u != "u" || p != "p" {
				w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
				w.WriteHeader(http.StatusUnauthorized)
				return true
			}
			if strings.Contains(r.URL.Path, "/blobs/") {
				http.Redirect(w, r, "http://"+cdn+r.URL.Path, http.StatusTemporaryRedirect)
				return true
			}
			return false
		})
		s, _ := newStore(t)
		if _, err := s.Pull(testContext(t), host+"/web:v1", image.PullOptions{Auth: &image.Auth{Username: "u", Password: "p"}}); err != nil {
			t.Fatal(err)
		}
		if leaked.Load() != 0 || served.Load() == 0 {
			t.Errorf("%d redirects there: credentials were sent to the other host in %d of %d requests", hops, leaked.Load(), served.Load())
		}
	}
}

// TestRedirectOfTokenRequest: a token server that redirects the form with the password to another host does not get it sent there.
func TestRedirectOfTokenRequest(t *testing.T) {
	reg, _ := newRegistry(t)
	build(t, "gzip", tarOf(t, f("x", "1"))).push(t, reg, "web:v1")
	var leaked atomic.Int32
	other := front(t, reg, func(w http.ResponseWriter, r *http.Request) bool {
		if b, _ := io.ReadAll(r.Body); bytes.Contains(b, []byte("hunter2")) || r.Header.Get("Authorization") != "" {
			leaked.Add(1)
		}
		w.WriteHeader(http.StatusUnauthorized)
		return true
	})
	host := front(t, reg, func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path == "/token" {
			http.Redirect(w, r, "http://"+other+"/token", http.StatusTemporaryRedirect)
			return true
		}
		w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="http://%s/token",service="s",scope="repository:web:pull"`, r.Host))
		w.WriteHeader(http.StatusUnauthorized)
		return true
	})
	s, _ := newStore(t)
	if _, err := s.Pull(testContext(t), host+"/web:v1", image.PullOptions{Auth: &image.Auth{Username: "u", Password: "hunter2"}}); err == nil {
		t.Error("pulled without a token")
	}
	if leaked.Load() != 0 {
		t.Error("the password followed a redirect to another host")
	}
}

func TestMirror(t *testing.T) {
	reg, mirror := newRegistry(t)
	build(t, "gzip", tarOf(t, f("x", "1"))).push(t, reg, "library/web:v1")
	s, err := image.Open(image.Config{Root: filepath.Join(t.TempDir(), "images"), Mirrors: map[string][]string{"docker.io": {"http://" + mirror}}})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	img, err := s.Pull(testContext(t), "web:v1", image.PullOptions{})
	if err != nil || img.Tags[0] != "web:v1" {
		t.Errorf("got %+v, %v", img.Tags, err)
	}
}

func TestTLSRegistry(t *testing.T) {
	reg, err := registry.New(registry.Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	build(t, "gzip", tarOf(t, f("x", "1"))).push(t, reg, "web:v1")
	srv := httptest.NewTLSServer(reg)
	defer srv.Close()
	s, _ := newStore(t)
	if _, err := s.Pull(testContext(t), strings.TrimPrefix(srv.URL, "https://")+"/web:v1", image.PullOptions{}); err != nil {
		t.Error(err) // loopback is trusted without a known certificate
	}
}
