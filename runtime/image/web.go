package image

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
)

const (
	dialTimeout   = 5 * time.Second // five attempts are made
	headerTimeout = 15 * time.Second
	maxToken      = 1 << 20
	plainHosts    = 256 // remembered hosts that speak plain HTTP
	dockerHub     = "docker.io"
	dockerHubHost = "registry-1.docker.io"
)

// web is how the store speaks HTTP. It is the http.RoundTripper of every request and keeps three rules whatever a registry answers:
// plain HTTP and unknown certificates only where declared, no credential to another host than it was made for, and no redirect from
// the network into this machine.
type web struct {
	secure, insecure *http.Transport
	hosts            map[string]bool // "host" or "host:port"
	nets             []netip.Prefix
	mirrors          map[string][]string

	mu    sync.Mutex
	plain map[string]bool // insecure hosts found to speak plain HTTP
}

func newWeb(cfg Config) (*web, error) {
	w := &web{secure: newTransport(), insecure: newTransport(), hosts: map[string]bool{"localhost": true}, plain: map[string]bool{}, mirrors: cfg.Mirrors,
		nets: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("::1/128")}}
	w.insecure.TLSClientConfig = &tls.Config{InsecureSkipVerify: true} //nolint:gosec // declared by the administrator, host by host
	for _, e := range cfg.Insecure {
		if p, err := netip.ParsePrefix(e); err == nil {
			w.nets = append(w.nets, p)
			continue
		}
		if e == "" || strings.ContainsAny(e, "/ @?#") {
			return nil, kind(errdefs.ErrInvalidArgument, "insecure registry %q: want HOST, HOST:PORT or a CIDR, without scheme or path", e)
		}
		w.hosts[strings.ToLower(e)] = true
	}
	for host, ms := range cfg.Mirrors {
		for _, m := range ms {
			if _, err := mirrorURL(m); err != nil {
				return nil, kind(errdefs.ErrInvalidArgument, "mirror %q of %s: %v", m, host, err)
			}
		}
	}
	return w, nil
}

func newTransport() *http.Transport {
	return &http.Transport{
		Proxy:                 http.ProxyFromEnvironment,
		DialContext:           (&net.Dialer{Timeout: dialTimeout, KeepAlive: 30 * time.Second, ControlContext: controlDial}).DialContext,
		TLSHandshakeTimeout:   dialTimeout,
		ResponseHeaderTimeout: headerTimeout,
		MaxIdleConns:          32,
		MaxIdleConnsPerHost:   4,
		IdleConnTimeout:       30 * time.Second,
		DisableCompression:    true, // digests are of the bytes as served
		ForceAttemptHTTP2:     true,
	}
}

func (w *web) close() {
	w.secure.CloseIdleConnections()
	w.insecure.CloseIdleConnections()
}

// isInsecure tells whether host, with or without port, may be spoken to without proof of who it is.
func (w *web) isInsecure(host string) bool {
	host = strings.ToLower(host)
	name := hostname(host)
	if w.hosts[host] || w.hosts[name] {
		return true
	}
	ip, err := netip.ParseAddr(name)
	if err != nil {
		return false
	}
	for _, n := range w.nets {
		if n.Contains(ip.Unmap()) {
			return true
		}
	}
	return false
}

func hostname(hostport string) string {
	if h, _, err := net.SplitHostPort(hostport); err == nil {
		return h
	}
	return strings.Trim(hostport, "[]")
}

// RoundTrip implements http.RoundTripper.
func (w *web) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := w.send(r)
	if err == nil && strings.Contains(r.URL.Path, "/manifests/") {
		resp.Body = &boundedBody{ReadCloser: resp.Body, left: maxDocument}
	}
	return resp, err
}

func (w *web) send(r *http.Request) (*http.Response, error) {
	r, err := w.guard(r)
	if err != nil {
		return nil, err
	}
	if !w.isInsecure(r.URL.Host) {
		if r.URL.Scheme == "http" {
			return nil, fmt.Errorf("%s: %w", r.URL.Host, errPlainHTTP)
		}
		return w.secure.RoundTrip(r)
	}
	if r.URL.Scheme == "http" || w.isPlain(r.URL.Host) {
		return w.insecure.RoundTrip(plainly(r))
	}
	resp, err := w.insecure.RoundTrip(r)
	if err != nil && speaksPlainHTTP(err, r.URL.Host) && r.Body == nil {
		w.setPlain(r.URL.Host)
		return w.insecure.RoundTrip(plainly(r))
	}
	return resp, err
}

func plainly(r *http.Request) *http.Request {
	r = r.Clone(r.Context())
	r.URL.Scheme = "http"
	return r
}

func speaksPlainHTTP(err error, host string) bool {
	if strings.Contains(err.Error(), errPlainHTTP.Error()) {
		return true
	}
	var tlsErr tls.RecordHeaderError
	if errors.As(err, &tlsErr) && string(tlsErr.RecordHeader[:]) == "HTTP/" {
		return true
	}
	var op *net.OpError
	_, _, noPort := net.SplitHostPort(host)
	return noPort != nil && errors.As(err, &op) && op.Op == "dial" // nothing on 443: try 80
}

func (w *web) isPlain(host string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.plain[host]
}

func (w *web) setPlain(host string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.plain) >= plainHosts {
		clear(w.plain)
	}
	w.plain[host] = true
}

// awayKey marks the context of a request that a registry, not the user, aimed at its host.
type awayKey struct{}

// controlDial refuses connections into this machine for such requests, after names were resolved.
func controlDial(ctx context.Context, _, address string, _ syscall.RawConn) error {
	if ctx.Value(awayKey{}) != nil && isLocal(address) {
		return kind(errdefs.ErrPermissionDenied, "a registry points to this machine's own network (%s): refused", address)
	}
	return nil
}

// tokenTrip fetches tokens for the registry home from wherever it says they are.
type tokenTrip struct {
	w    *web
	home string
}

func (t tokenTrip) RoundTrip(r *http.Request) (*http.Response, error) {
	if !isLocal(t.home) {
		if isLocal(r.URL.Host) {
			return nil, kind(errdefs.ErrPermissionDenied, "registry %s names a token server on this machine's own network (%s): refused", t.home, r.URL.Host)
		}
		r = r.Clone(context.WithValue(r.Context(), awayKey{}, true))
	}
	resp, err := t.w.RoundTrip(r)
	if err == nil {
		resp.Body = &boundedBody{ReadCloser: resp.Body, left: maxToken}
	}
	return resp, err
}

// boundedBody fails where a longer body than a document may have begins.
type boundedBody struct {
	io.ReadCloser
	left int64
}

func (b *boundedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if b.left -= int64(n); b.left < 0 {
		return 0, kind(errdefs.ErrInvalidArgument, "registry sends a longer document than is allowed")
	}
	return n, err
}

// guard keeps a redirect from taking credentials elsewhere or from reaching services of this machine. It looks at the whole chain: a host
// that was redirected to may redirect to itself, and net/http then adds again what the first request had.
func (w *web) guard(r *http.Request) (*http.Request, error) {
	to, away, outside := r.URL.Host, false, false
	for prev := r.Response; prev != nil && prev.Request != nil; prev = prev.Request.Response {
		from := prev.Request.URL.Host
		if from == to {
			continue
		}
		away = true
		if isLocal(from) {
			continue
		}
		outside = true
		if isLocal(to) {
			return nil, kind(errdefs.ErrPermissionDenied, "registry %s redirects to this machine's own network (%s): refused", from, to)
		}
	}
	if !away {
		return r, nil
	}
	if r.Body != nil && r.Body != http.NoBody {
		return nil, kind(errdefs.ErrPermissionDenied, "a request with a body, which may hold credentials, is redirected to another host (%s): refused", to)
	}
	ctx := r.Context()
	if outside {
		ctx = context.WithValue(ctx, awayKey{}, true)
	}
	r = r.Clone(ctx)
	r.Header.Del("Authorization")
	r.Header.Del("Cookie")
	return r, nil
}

func isLocal(host string) bool {
	name := hostname(host)
	if name == "localhost" || strings.HasSuffix(name, ".localhost") {
		return true
	}
	ip, err := netip.ParseAddr(name)
	if err != nil {
		return false
	}
	ip = ip.Unmap()
	return ip.IsLoopback() || ip.IsLinkLocalUnicast() || ip.IsUnspecified()
}

func mirrorURL(m string) (*url.URL, error) {
	if !strings.Contains(m, "://") {
		m = "https://" + m
	}
	u, err := url.Parse(m)
	if err != nil {
		return nil, err
	}
	if (u.Scheme != "http" && u.Scheme != "https") || u.Host == "" {
		return nil, errors.New("want [http(s)://]HOST[:PORT][/PATH]")
	}
	return u, nil
}

// resolver makes a client for one reference with one credential; neither outlives the pull.
func (w *web) resolver(named reference.Named, a *Auth) remotes.Resolver {
	home := reference.Domain(named)
	if home == dockerHub {
		home = dockerHubHost
	}
	client := &http.Client{Transport: w}
	tokens := &http.Client{Transport: tokenTrip{w, home}}
	auth := docker.NewDockerAuthorizer(docker.WithAuthClient(tokens), docker.WithAuthCreds(func(host string) (string, string, error) {
		if a == nil || host != home {
			return "", "", nil
		}
		if a.IdentityToken != "" {
			return "", a.IdentityToken, nil
		}
		return a.Username, a.Password, nil
	}))
	return docker.NewResolver(docker.ResolverOptions{Hosts: func(ns string) ([]docker.RegistryHost, error) {
		var hosts []docker.RegistryHost
		for _, m := range w.mirrors[ns] {
			u, err := mirrorURL(m)
			if err != nil {
				return nil, err
			}
			hosts = append(hosts, docker.RegistryHost{Client: client, Authorizer: auth, Host: u.Host, Scheme: u.Scheme, Path: strings.TrimSuffix(u.Path, "/") + "/v2",
				Capabilities: docker.HostCapabilityPull | docker.HostCapabilityResolve})
		}
		origin := docker.RegistryHost{Client: client, Authorizer: auth, Host: home, Scheme: "https", Path: "/v2",
			Capabilities: docker.HostCapabilityPull | docker.HostCapabilityResolve | docker.HostCapabilityPush}
		if a != nil && a.RegistryToken != "" {
			origin.Header = http.Header{"Authorization": {"Bearer " + a.RegistryToken}}
		}
		return append(hosts, origin), nil
	}})
}
