package dockerapi

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"net/url"
	"regexp"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/common"
)

// The range of API versions served: 1.<n>.
const (
	maxMinor = 55 // what moby/api v1.55 describes
	minMinor = 40 // the oldest that current clients still speak

	// MaxAPIVersion is the newest API version served; clients negotiate down to their own.
	MaxAPIVersion = "1.55"
	// MinAPIVersion is the oldest API version served.
	MinAPIVersion = "1.40"
)

// Config names the backends behind the API. All are required, except Logger and those that say so.
type Config struct {
	Containers Containers
	Images     Images
	Networks   Networks
	System     System
	Swarm      Swarm
	Volumes    Volumes      // nil: the node has none
	Archives   Archives     // nil: nothing can be copied from and to containers
	Limits     Limits       // nil: no statistics, no change of limits
	Logger     *slog.Logger // nil: discard
	Version    string       // of this program, for the Server header
}

// handlers is the router's state: its backends and nothing else.
type handlers struct {
	Config
}

// handler answers one request. A returned error becomes a status code and {"message": …}, unless an answer has begun.
type handler func(w http.ResponseWriter, r *http.Request) error

// route is one line of the routing table, in net/http's pattern language.
type route struct {
	pattern string
	handle  handler
}

// New returns the handler of the whole API. It starts nothing.
func New(cfg Config) http.Handler {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	h := &handlers{Config: cfg}
	mux := http.NewServeMux()
	taken := map[string]bool{}
	for _, table := range [][]route{
		h.systemRoutes(), h.containerRoutes(), h.execRoutes(), h.imageRoutes(), h.networkRoutes(), h.swarmRoutes(), h.nodeRoutes(),
		h.serviceRoutes(), h.taskRoutes(), h.skeinRoutes(), h.volumeRoutes(), h.archiveRoutes(), h.limitRoutes(), h.dependencyRoutes(), missingRoutes(),
	} {
		for _, rt := range table {
			if taken[rt.pattern] { // an optional backend is there: its route was first
				continue
			}
			taken[rt.pattern] = true
			mux.Handle(rt.pattern, h.wrap(rt.handle))
		}
	}
	mux.Handle("/", h.wrap(func(http.ResponseWriter, *http.Request) error { return notFound("page not found") }))
	return h.front(mux)
}

var versionPrefix = regexp.MustCompile(`^/v([0-9]{1,3})\.([0-9]{1,4})(/.*)$`)

// minorKey carries the minor API version a request asked for.
type minorKey struct{}

// apiMinor is the minor version of the API that the client speaks; without a prefix it speaks the newest.
func apiMinor(r *http.Request) int {
	if n, ok := r.Context().Value(minorKey{}).(int); ok {
		return n
	}
	return maxMinor
}

// front sets the headers that every answer carries, recovers panics and takes the version off the path.
func (h *handlers) front(next http.Handler) http.Handler {
	return http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		w := &response{ResponseWriter: rw}
		defer h.recover(w, r)
		hd := w.Header()
		hd.Set("Server", "Skein/"+h.Version+" (linux)")
		hd.Set("Api-Version", MaxAPIVersion)
		hd.Set("Ostype", "linux")
		hd.Set("Docker-Experimental", "false")

		r, err := stripVersion(r)
		if err != nil {
			h.fail(w, r, err)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// stripVersion returns the request without its version prefix, or refuses a version that is not served.
func stripVersion(r *http.Request) (*http.Request, error) {
	m := versionPrefix.FindStringSubmatch(r.URL.Path)
	if m == nil {
		return r, nil
	}
	major, _ := strconv.Atoi(m[1])
	minor, _ := strconv.Atoi(m[2])
	asked := m[1] + "." + m[2]
	switch {
	case major > 1 || major == 1 && minor > maxMinor:
		return r, invalid("client version %s is too new. Maximum supported API version is %s", asked, MaxAPIVersion)
	case major < 1 || minor < minMinor:
		return r, invalid("client version %s is too old. Minimum supported API version is %s, please upgrade your client to a newer version", asked, MinAPIVersion)
	}
	out := r.WithContext(context.WithValue(r.Context(), minorKey{}, minor))
	out.URL = new(url.URL)
	*out.URL = *r.URL
	out.URL.Path = m[3]
	if raw := r.URL.RawPath; raw != "" {
		out.URL.RawPath = strings.TrimPrefix(raw, "/v"+asked)
	}
	return out, nil
}

// wrap turns a handler into net/http's, logging what it did.
func (h *handlers) wrap(next handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		start := time.Now()
		err := next(w, r)
		h.Logger.Debug("api request", "method", r.Method, "path", r.URL.Path, "took", time.Since(start), "err", err)
		if err != nil {
			h.fail(w, r, err)
		}
	})
}

// fail answers with an error. Nothing can be said any more once an answer has begun: the connection is cut, so that the client sees an
// answer that is not whole.
func (h *handlers) fail(w http.ResponseWriter, r *http.Request, err error) {
	if began(w) {
		if r.Context().Err() == nil {
			h.Logger.Warn("api answer cut short", "method", r.Method, "path", r.URL.Path, "err", err)
		}
		panic(http.ErrAbortHandler)
	}
	code, text := statusOf(err)
	if code == http.StatusNotModified {
		w.WriteHeader(code)
		return
	}
	if code >= http.StatusInternalServerError && !errdefs.IsNotImplemented(err) && !errors.Is(err, context.Canceled) {
		level := slog.LevelError
		if code != http.StatusInternalServerError { // the cluster has no leader, or takes too long: that is not this daemon's failure
			level = slog.LevelWarn
		}
		h.Logger.Log(r.Context(), level, "api request failed", "method", r.Method, "path", r.URL.Path, "status", code, "err", err)
	}
	_ = writeJSON(w, code, common.ErrorResponse{Message: text})
}

// recover keeps one broken request from ending the daemon.
func (h *handlers) recover(w *response, r *http.Request) {
	p := recover()
	if p == nil {
		return
	}
	if err, ok := p.(error); ok && errors.Is(err, http.ErrAbortHandler) {
		panic(p)
	}
	h.Logger.Error("api handler panicked", "method", r.Method, "path", r.URL.Path, "panic", p, "stack", string(debug.Stack()))
	if w.began {
		panic(http.ErrAbortHandler)
	}
	_ = writeJSON(w, http.StatusInternalServerError, common.ErrorResponse{Message: "internal error: the request made the daemon panic; its log has the details"})
}

// response remembers whether an answer has begun.
type response struct {
	http.ResponseWriter
	began bool
}

func (w *response) WriteHeader(code int) {
	w.began = true
	w.ResponseWriter.WriteHeader(code)
}

func (w *response) Write(b []byte) (int, error) {
	w.began = true
	return w.ResponseWriter.Write(b)
}

// Unwrap lets http.ResponseController reach Flush, Hijack and deadlines.
func (w *response) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func began(w http.ResponseWriter) bool {
	rw, ok := w.(*response)
	return ok && rw.began
}
