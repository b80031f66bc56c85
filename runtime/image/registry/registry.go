// Package registry is a small OCI distribution (v2) server: an http.Handler over blobs in memory or in a directory.
//
// It stores a blob only under the digest of its bytes and a manifest only as it was pushed; bodies are bounded; uploads that are not
// finished go after a while. It knows no users: whoever reaches the handler may read and write, so wrap it. Nothing is ever deleted.
// Used by the demo, by tests, and as the seed of the registry inside the cluster.
package registry

import (
	"encoding/json"
	"fmt"
	"net/http"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

const (
	maxManifest = 4 << 20
	uploadAge   = time.Hour // an upload untouched for so long is dropped
	maxUploads  = 256       // at once
	defaultBlob = 16 << 30
	maxTags     = 10_000 // per repository
	maxRepos    = 10_000
)

// Config of a Registry.
type Config struct {
	// Dir, when set, holds the blobs, manifests and tags; otherwise they are in memory.
	Dir string
	// MaxBlob bounds one blob; 0 means 16 GiB on disk and 256 MiB in memory.
	MaxBlob int64
}

// Registry is an OCI distribution server. Use New.
type Registry struct {
	max   int64
	blobs blobStore

	mu      sync.Mutex
	repos   map[string]*repo
	uploads map[string]*upload
}

// repo is what one repository serves.
type repo struct {
	Tags      map[string]digest.Digest `json:"tags"`
	Manifests map[digest.Digest]string `json:"manifests"` // media types
}

// New opens the registry in cfg.Dir, or an empty one in memory.
func New(cfg Config) (*Registry, error) {
	r := &Registry{max: cfg.MaxBlob, repos: map[string]*repo{}, uploads: map[string]*upload{}}
	if cfg.Dir == "" {
		if r.max == 0 {
			r.max = 256 << 20
		}
		r.blobs = &memory{m: map[digest.Digest][]byte{}}
		return r, nil
	}
	if r.max == 0 {
		r.max = defaultBlob
	}
	d, err := openDirectory(cfg.Dir)
	if err != nil {
		return nil, fmt.Errorf("open registry in %s: %w", cfg.Dir, err)
	}
	r.blobs = d
	if r.repos, err = d.loadRepos(); err != nil {
		return nil, fmt.Errorf("open registry in %s: %w", cfg.Dir, err)
	}
	return r, nil
}

// Put stores an image under "name:tag" (or "name"), as a push would: the blobs, then the manifest that refers to them.
func (r *Registry) Put(ref, mediaType string, manifest []byte, blobs ...[]byte) (digest.Digest, error) {
	name, tag, ok := strings.Cut(ref, ":")
	if !ok {
		tag = "latest"
	}
	if !nameExp.MatchString(name) || !tagExp.MatchString(tag) {
		return "", fmt.Errorf("put %q: want NAME[:TAG] in lower case: %w", ref, errdefs.ErrInvalidArgument)
	}
	for _, b := range blobs {
		if err := r.blobs.put(digest.FromBytes(b), b); err != nil {
			return "", fmt.Errorf("put %s: %w", ref, err)
		}
	}
	d, err := r.putManifest(name, tag, mediaType, manifest)
	if err != nil {
		return "", fmt.Errorf("put %s: %w", ref, err)
	}
	return d, nil
}

var (
	nameExp = regexp.MustCompile(`^[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*$`)
	tagExp  = regexp.MustCompile(`^[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}$`)
)

// ServeHTTP implements http.Handler.
func (r *Registry) ServeHTTP(w http.ResponseWriter, q *http.Request) {
	w.Header().Set("Docker-Distribution-Api-Version", "registry/2.0")
	path, ok := strings.CutPrefix(q.URL.Path, "/v2/")
	if !ok {
		fail(w, http.StatusNotFound, "UNSUPPORTED", "only /v2/ is served")
		return
	}
	if path == "" {
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write([]byte("{}"))
		return
	}
	name, kind, rest := split(path)
	if kind == "" || len(name) > 255 || !nameExp.MatchString(name) {
		fail(w, http.StatusNotFound, "NAME_INVALID", "no such endpoint or repository name")
		return
	}
	switch kind {
	case "manifests":
		r.manifests(w, q, name, rest)
	case "blobs":
		r.blob(w, q, name, rest)
	case "uploads":
		r.upload(w, q, name, rest)
	case "tags":
		r.tags(w, q, name)
	}
}

// split takes "NAME/manifests/REF" and its siblings apart; names may contain the words too, so the last one counts.
func split(path string) (name, kind, rest string) {
	if i := strings.LastIndex(path, "/blobs/uploads"); i > 0 {
		return path[:i], "uploads", strings.TrimPrefix(strings.TrimPrefix(path[i:], "/blobs/uploads"), "/")
	}
	if n, ok := strings.CutSuffix(path, "/tags/list"); ok {
		return n, "tags", ""
	}
	for _, k := range []string{"manifests", "blobs"} {
		if i := strings.LastIndex(path, "/"+k+"/"); i > 0 {
			return path[:i], k, path[i+len(k)+2:]
		}
	}
	return "", "", ""
}

// fail answers as the specification wants errors.
func fail(w http.ResponseWriter, status int, code, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	type e struct {
		Code    string `json:"code"`
		Message string `json:"message"`
	}
	_ = json.NewEncoder(w).Encode(map[string][]e{"errors": {{code, message}}}) // the client may be gone
}

// failWith chooses the status by the kind of err.
func failWith(w http.ResponseWriter, err error, notFound string) {
	switch {
	case errdefs.IsNotFound(err):
		fail(w, http.StatusNotFound, notFound, err.Error())
	case errdefs.IsInvalidArgument(err):
		fail(w, http.StatusBadRequest, strings.Replace(notFound, "_UNKNOWN", "_INVALID", 1), err.Error())
	case errdefs.IsResourceExhausted(err):
		fail(w, http.StatusRequestEntityTooLarge, "SIZE_INVALID", err.Error())
	default:
		fail(w, http.StatusInternalServerError, "UNKNOWN", err.Error())
	}
}

func notAllowed(w http.ResponseWriter) {
	fail(w, http.StatusMethodNotAllowed, "UNSUPPORTED", "the operation is unsupported")
}
