package registry

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"sort"
	"strconv"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func (r *Registry) manifests(w http.ResponseWriter, q *http.Request, name, ref string) {
	switch q.Method {
	case http.MethodGet, http.MethodHead:
		d, mediaType, err := r.find(name, ref)
		if err != nil {
			failWith(w, err, "MANIFEST_UNKNOWN")
			return
		}
		w.Header().Set("Content-Type", mediaType)
		r.serve(w, q, d)
	case http.MethodPut:
		b, err := io.ReadAll(http.MaxBytesReader(w, q.Body, maxManifest))
		if err != nil {
			fail(w, http.StatusRequestEntityTooLarge, "SIZE_INVALID", fmt.Sprintf("a manifest has at most %d bytes", maxManifest))
			return
		}
		d, err := r.putManifest(name, ref, q.Header.Get("Content-Type"), b)
		if err != nil {
			failWith(w, err, "MANIFEST_BLOB_UNKNOWN")
			return
		}
		w.Header().Set("Docker-Content-Digest", d.String())
		w.Header().Set("Location", "/v2/"+name+"/manifests/"+d.String())
		w.WriteHeader(http.StatusCreated)
	default:
		notAllowed(w)
	}
}

func (r *Registry) find(name, ref string) (digest.Digest, string, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	p := r.repos[name]
	if p == nil {
		return "", "", fmt.Errorf("repository %s: %w", name, errdefs.ErrNotFound)
	}
	d := digest.Digest(ref)
	if d.Validate() != nil {
		d = p.Tags[ref]
	}
	mediaType, ok := p.Manifests[d]
	if !ok {
		return "", "", fmt.Errorf("manifest %s of %s: %w", ref, name, errdefs.ErrNotFound)
	}
	return d, mediaType, nil
}

// putManifest checks that a manifest is one, and that what it needs is here, before it gets a name.
func (r *Registry) putManifest(name, ref, mediaType string, b []byte) (digest.Digest, error) {
	d := digest.FromBytes(b)
	want := digest.Digest(ref)
	byDigest := want.Validate() == nil
	if byDigest {
		d = want.Algorithm().FromBytes(b)
	}
	if !byDigest && !tagExp.MatchString(ref) {
		return "", fmt.Errorf("tag %.200q: %w", ref, errdefs.ErrInvalidArgument)
	}
	if byDigest && want != d {
		return "", fmt.Errorf("manifest is %s, not %s: %w", d, want, errdefs.ErrInvalidArgument)
	}
	var m struct {
		MediaType string               `json:"mediaType"`
		Config    *ocispec.Descriptor  `json:"config"`
		Layers    []ocispec.Descriptor `json:"layers"`
		Manifests []ocispec.Descriptor `json:"manifests"`
	}
	if err := json.Unmarshal(b, &m); err != nil || len(b) > maxManifest {
		return "", fmt.Errorf("manifest is no JSON or too long: %w", errdefs.ErrInvalidArgument)
	}
	if mediaType == "" {
		mediaType = m.MediaType
	}
	if mediaType == "" || (m.MediaType != "" && m.MediaType != mediaType) || (m.Manifests != nil && (m.Config != nil || m.Layers != nil)) {
		return "", fmt.Errorf("manifest's media type %q does not fit its content: %w", mediaType, errdefs.ErrInvalidArgument)
	}
	if m.Config != nil {
		m.Layers = append(m.Layers, *m.Config)
	}
	for _, l := range m.Layers {
		if !r.blobs.has(l.Digest) && len(l.URLs) == 0 {
			return "", fmt.Errorf("blob %s, which the manifest needs: %w", l.Digest, errdefs.ErrNotFound)
		}
	}
	if err := r.blobs.put(d, b); err != nil {
		return "", err
	}
	return d, r.setManifest(name, ref, byDigest, d, mediaType)
}

func (r *Registry) setManifest(name, ref string, byDigest bool, d digest.Digest, mediaType string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	p := r.repos[name]
	if p == nil {
		if len(r.repos) >= maxRepos {
			return fmt.Errorf("registry has %d repositories: %w", maxRepos, errdefs.ErrResourceExhausted)
		}
		p = &repo{Tags: map[string]digest.Digest{}, Manifests: map[digest.Digest]string{}}
		r.repos[name] = p
	}
	if len(p.Tags) >= maxTags || len(p.Manifests) >= maxTags {
		return fmt.Errorf("repository %s has %d tags or manifests: %w", name, maxTags, errdefs.ErrResourceExhausted)
	}
	p.Manifests[d] = mediaType
	if !byDigest {
		p.Tags[ref] = d
	}
	return r.blobs.saveRepo(name, p)
}

func (r *Registry) tags(w http.ResponseWriter, q *http.Request, name string) {
	if q.Method != http.MethodGet {
		notAllowed(w)
		return
	}
	r.mu.Lock()
	p := r.repos[name]
	var tags []string
	if p != nil {
		for t := range p.Tags {
			tags = append(tags, t)
		}
	}
	r.mu.Unlock()
	if p == nil {
		fail(w, http.StatusNotFound, "NAME_UNKNOWN", "repository "+name+" is not known")
		return
	}
	sort.Strings(tags)
	tags, more := page(tags, q.URL.Query())
	if more {
		v := url.Values{"n": {q.URL.Query().Get("n")}, "last": {tags[len(tags)-1]}}
		w.Header().Set("Link", "</v2/"+name+"/tags/list?"+v.Encode()+`>; rel="next"`)
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(map[string]any{"name": name, "tags": append([]string{}, tags...)}) // the client may be gone
}

// page cuts sorted tags by the parameters n and last.
func page(tags []string, v url.Values) (_ []string, more bool) {
	if last := v.Get("last"); last != "" {
		tags = tags[sort.Search(len(tags), func(i int) bool { return tags[i] > last }):]
	}
	if n, err := strconv.Atoi(v.Get("n")); err == nil && n >= 0 && n < len(tags) {
		return tags[:n], n > 0
	}
	return tags, false
}
