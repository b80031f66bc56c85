package registry

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// both runs a test on either kind of storage; again reopens the registry where that means something.
func both(t *testing.T, max int64, f func(t *testing.T, url string, again func() string)) {
	for _, kind := range []string{"memory", "directory"} {
		t.Run(kind, func(t *testing.T) {
			cfg := Config{MaxBlob: max}
			if kind == "directory" {
				cfg.Dir = t.TempDir()
			}
			serve := func() string {
				r, err := New(cfg)
				if err != nil {
					t.Fatal(err)
				}
				srv := httptest.NewServer(r)
				t.Cleanup(srv.Close)
				return srv.URL
			}
			url := serve()
			f(t, url, func() string {
				if cfg.Dir != "" {
					return serve()
				}
				return url
			})
		})
	}
}

type reply struct {
	*http.Response
	body []byte
}

func do(t *testing.T, method, url string, body io.Reader, header ...string) reply {
	t.Helper()
	q, err := http.NewRequest(method, url, body)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		q.Header.Set(header[i], header[i+1])
	}
	resp, err := http.DefaultClient.Do(q)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return reply{resp, b}
}

func (r reply) want(t *testing.T, status int, code string) reply {
	t.Helper()
	if r.StatusCode != status || !strings.Contains(string(r.body), code) {
		t.Errorf("%s %s: got %s %s, want %d %s", r.Request.Method, r.Request.URL, r.Status, r.body, status, code)
	}
	return r
}

func TestUploads(t *testing.T) {
	both(t, 1<<20, func(t *testing.T, url string, again func() string) {
		data := []byte(strings.Repeat("0123456789", 100))
		d := digest.FromBytes(data)
		do(t, "GET", url+"/v2/", nil).want(t, 200, "")
		do(t, "GET", url+"/v2/a/b/blobs/"+d.String(), nil).want(t, 404, "BLOB_UNKNOWN")

		// in chunks
		loc := url + do(t, "POST", url+"/v2/a/b/blobs/uploads/", nil).want(t, 202, "").Header.Get("Location")
		do(t, "PATCH", loc, bytes.NewReader(data[:400]), "Content-Range", "0-399").want(t, 202, "")
		do(t, "PATCH", loc, bytes.NewReader(data[400:]), "Content-Range", "300-899").want(t, 416, "BLOB_UPLOAD_INVALID")
		if r := do(t, "GET", loc, nil).want(t, 204, ""); r.Header.Get("Range") != "0-399" {
			t.Errorf("Range: %s", r.Header.Get("Range"))
		}
		do(t, "PUT", loc+"?digest="+d.String(), bytes.NewReader(data[400:])).want(t, 201, "")
		do(t, "PUT", loc+"?digest="+d.String(), nil).want(t, 404, "BLOB_UPLOAD_UNKNOWN")

		// whole, wrong, too long, cancelled, mounted
		do(t, "POST", url+"/v2/a/blobs/uploads/?digest="+digest.FromString("x").String(), strings.NewReader("x")).want(t, 201, "")
		do(t, "POST", url+"/v2/a/blobs/uploads/?digest="+d.String(), strings.NewReader("x")).want(t, 400, "DIGEST_INVALID")
		do(t, "POST", url+"/v2/a/blobs/uploads/?digest=sha256:abc", strings.NewReader("x")).want(t, 400, "DIGEST_INVALID")
		do(t, "POST", url+"/v2/a/blobs/uploads/?digest="+d.String(), bytes.NewReader(make([]byte, 1<<20+1))).want(t, 413, "SIZE_INVALID")
		loc = url + do(t, "POST", url+"/v2/a/blobs/uploads/", nil).want(t, 202, "").Header.Get("Location")
		do(t, "DELETE", loc, nil).want(t, 204, "")
		do(t, "PATCH", loc, strings.NewReader("x")).want(t, 404, "BLOB_UPLOAD_UNKNOWN")
		do(t, "POST", url+"/v2/c/blobs/uploads/?from=a/b&mount="+d.String(), nil).want(t, 201, "")

		for _, u := range []string{url, again()} {
			if r := do(t, "GET", u+"/v2/a/b/blobs/"+d.String(), nil).want(t, 200, ""); !bytes.Equal(r.body, data) {
				t.Errorf("got %d bytes", len(r.body))
			}
			if r := do(t, "HEAD", u+"/v2/a/b/blobs/"+d.String(), nil).want(t, 200, ""); r.ContentLength != 1000 || r.Header.Get("Docker-Content-Digest") != d.String() {
				t.Errorf("HEAD: %v", r.Header)
			}
			if r := do(t, "GET", u+"/v2/a/b/blobs/"+d.String(), nil, "Range", "bytes=995-").want(t, 206, ""); string(r.body) != "56789" {
				t.Errorf("range: %q", r.body)
			}
		}
	})
}

func TestManifests(t *testing.T) {
	both(t, 0, func(t *testing.T, url string, again func() string) {
		blob := []byte("{}")
		m := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Config: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: digest.FromBytes(blob), Size: 2}}
		m.SchemaVersion = 2
		b, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		d := digest.FromBytes(b)
		put := func(ref string, body []byte, mediaType string) reply {
			return do(t, "PUT", url+"/v2/web/manifests/"+ref, bytes.NewReader(body), "Content-Type", mediaType)
		}
		put("v1", b, m.MediaType).want(t, 404, "MANIFEST_BLOB_UNKNOWN")
		do(t, "POST", url+"/v2/web/blobs/uploads/?digest="+m.Config.Digest.String(), bytes.NewReader(blob)).want(t, 201, "")
		put("v1", b, m.MediaType).want(t, 201, "")
		put("v2", b, m.MediaType).want(t, 201, "")
		put(d.String(), b, m.MediaType).want(t, 201, "")
		put(digest.FromString("other").String(), b, m.MediaType).want(t, 400, "")
		put("-bad", b, m.MediaType).want(t, 400, "")
		put("v3", b, ocispec.MediaTypeImageIndex).want(t, 400, "")
		put("v3", []byte("{"), m.MediaType).want(t, 400, "")
		put("v3", bytes.Repeat([]byte(" "), maxManifest+1), m.MediaType).want(t, 413, "SIZE_INVALID")
		for _, u := range []string{url, again()} {
			for _, ref := range []string{"v1", d.String()} {
				r := do(t, "GET", u+"/v2/web/manifests/"+ref, nil).want(t, 200, "")
				if !bytes.Equal(r.body, b) || r.Header.Get("Content-Type") != m.MediaType || r.Header.Get("Docker-Content-Digest") != d.String() {
					t.Errorf("got %v %s", r.Header, r.body)
				}
				if r := do(t, "HEAD", u+"/v2/web/manifests/"+ref, nil).want(t, 200, ""); r.ContentLength != int64(len(b)) {
					t.Errorf("HEAD: %v", r.Header)
				}
			}
			do(t, "GET", u+"/v2/web/manifests/v3", nil).want(t, 404, "MANIFEST_UNKNOWN")
			do(t, "GET", u+"/v2/web/tags/list", nil).want(t, 200, `{"name":"web","tags":["v1","v2"]}`)
			if r := do(t, "GET", u+"/v2/web/tags/list?n=1", nil).want(t, 200, `["v1"]`); !strings.Contains(r.Header.Get("Link"), "last=v1") {
				t.Errorf("Link: %q", r.Header.Get("Link"))
			}
			do(t, "GET", u+"/v2/web/tags/list?last=v1", nil).want(t, 200, `["v2"]`)
			do(t, "GET", u+"/v2/none/tags/list", nil).want(t, 404, "NAME_UNKNOWN")
		}
		for _, p := range []string{"/", "/v2/UPPER/manifests/x", "/v2/../../etc/manifests/x", "/v2/web/blobs/..%2f..%2fx", "/v2/web", "/v2/web/manifests/..%2f..%2fx"} {
			if r := do(t, "GET", url+p, nil); r.StatusCode != 404 && r.StatusCode != 400 {
				t.Errorf("%s: %s", p, r.Status)
			}
		}
		do(t, "DELETE", url+"/v2/web/manifests/v1", nil).want(t, 405, "UNSUPPORTED")
	})
}

// TestPusher pushes as a real client does.
func TestPusher(t *testing.T) {
	both(t, 0, func(t *testing.T, url string, _ func() string) {
		ctx := context.Background()
		host := strings.TrimPrefix(url, "http://")
		p, err := docker.NewResolver(docker.ResolverOptions{PlainHTTP: true}).Pusher(ctx, host+"/web:v1")
		if err != nil {
			t.Fatal(err)
		}
		cfg := []byte(`{"os":"linux"}`)
		m := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Config: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: digest.FromBytes(cfg), Size: int64(len(cfg))}}
		m.SchemaVersion = 2
		b, _ := json.Marshal(m)
		for _, x := range []struct {
			d    ocispec.Descriptor
			data []byte
		}{{m.Config, cfg}, {ocispec.Descriptor{MediaType: m.MediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}, b}} {
			w, err := p.Push(ctx, x.d)
			if err != nil {
				t.Fatal(err)
			}
			if err := content.Copy(ctx, w, bytes.NewReader(x.data), x.d.Size, x.d.Digest); err != nil {
				t.Fatal(err)
			}
		}
		do(t, "GET", url+"/v2/web/manifests/v1", nil).want(t, 200, "")
	})
}

func TestPut(t *testing.T) {
	r, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	for _, ref := range []string{"UPPER", "a:b:c", "../x", ""} {
		if _, err := r.Put(ref, ocispec.MediaTypeImageManifest, []byte("{}")); err == nil {
			t.Errorf("Put(%q): no error", ref)
		}
	}
	if _, err := r.Put("a/b", ocispec.MediaTypeImageManifest, []byte("{}")); err != nil {
		t.Error(err)
	}
}

func TestUploadsAreBounded(t *testing.T) {
	both(t, 0, func(t *testing.T, url string, _ func() string) {
		for range maxUploads {
			do(t, "POST", url+"/v2/a/blobs/uploads/", nil).want(t, 202, "")
		}
		do(t, "POST", url+"/v2/a/blobs/uploads/", nil).want(t, 429, "TOOMANYREQUESTS")
	})
}

func TestReopenDropsUploads(t *testing.T) {
	dir := t.TempDir()
	r, err := New(Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(r)
	do(t, "POST", srv.URL+"/v2/a/blobs/uploads/", nil).want(t, 202, "")
	srv.Close()
	if _, err := New(Config{Dir: dir}); err != nil {
		t.Fatal(err)
	}
	if es, err := os.ReadDir(filepath.Join(dir, "uploads")); err != nil || len(es) != 0 {
		t.Errorf("%d uploads are left: %v", len(es), err)
	}
}
