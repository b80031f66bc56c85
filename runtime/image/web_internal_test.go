package image

import (
	"context"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestIsInsecure(t *testing.T) {
	w, err := newWeb(Config{Insecure: []string{"reg.example:5000", "Plain.example", "10.1.0.0/16", "fd00::/8"}})
	if err != nil {
		t.Fatal(err)
	}
	for host, want := range map[string]bool{
		"127.0.0.1:5000": true, "127.8.9.1": true, "[::1]:5000": true, "localhost:5000": true, "localhost": true,
		"reg.example:5000": true, "reg.example": false, "reg.example:443": false, "plain.example:80": true, "PLAIN.example": true,
		"10.1.2.3:5000": true, "10.2.0.1:5000": false, "[fd00::7]:5000": true, "[fe80::1]:5000": false, "example.com": false,
		"registry-1.docker.io": false, "127.0.0.1.example.com": false, "[::ffff:127.0.0.1]:5000": true,
	} {
		if got := w.isInsecure(host); got != want {
			t.Errorf("isInsecure(%s): got %t", host, got)
		}
	}
}

// strict is a web to which loopback is like any other network.
func strict(t *testing.T) *web {
	t.Helper()
	w, err := newWeb(Config{})
	if err != nil {
		t.Fatal(err)
	}
	w.nets, w.hosts = []netip.Prefix{}, map[string]bool{}
	t.Cleanup(w.close)
	return w
}

func TestUndeclaredRegistries(t *testing.T) {
	h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusNotFound) })
	plain, tls := httptest.NewServer(h), httptest.NewTLSServer(h)
	defer plain.Close()
	defer tls.Close()
	s := &store{web: strict(t)}
	for url, want := range map[string]string{plain.URL: "speaks plain HTTP and is not declared insecure: start the daemon with --insecure-registry ", tls.URL: "certificate that is not trusted"} {
		host := url[strings.Index(url, "//")+2:]
		named, err := parseRef(host + "/web:v1")
		if err != nil {
			t.Fatal(err)
		}
		_, _, err = s.connect(s.scope(context.Background()), named, nil)
		if err == nil || !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "--insecure-registry "+host) {
			t.Errorf("%s: got %v, want %q", url, err, want)
		}
	}
}

func TestRedirectInward(t *testing.T) {
	w := strict(t)
	from := &http.Response{Request: httptest.NewRequest(http.MethodGet, "https://registry.example/v2/x/blobs/y", nil)}
	for url, refused := range map[string]bool{
		"https://169.254.169.254/latest": true, "https://127.0.0.1:2375/": true, "https://[::1]/": true, "https://localhost/": true,
		"https://0.0.0.0/": true, "https://cdn.example/": false, "https://[::ffff:127.0.0.1]/": true,
	} {
		r := httptest.NewRequest(http.MethodGet, url, nil)
		r.Header.Set("Authorization", "Bearer x")
		r.Response = from
		got, err := w.guard(r)
		if (err != nil) != refused {
			t.Errorf("%s: got %v", url, err)
		}
		if err == nil && got.Header.Get("Authorization") != "" {
			t.Errorf("%s: credential kept", url)
		}
		if err == nil && got.Context().Value(awayKey{}) == nil {
			t.Errorf("%s: its address will not be checked", url)
		}
	}
	if err := controlDial(context.WithValue(context.Background(), awayKey{}, true), "tcp", "127.0.0.1:80", nil); err == nil {
		t.Error("a redirect to a name of this machine is dialed")
	}
	if err := controlDial(context.Background(), "tcp", "127.0.0.1:80", nil); err != nil {
		t.Error(err)
	}
}
