package dockerapi

import (
	"io"
	"net/http"
	"strings"

	"github.com/distribution/reference"
	"github.com/moby/moby/api/types/image"
)

func (h *handlers) imageRoutes() []route {
	return []route{
		{"GET /images/json", h.imageList},
		{"POST /images/create", h.imageCreate},
		{"POST /images/load", h.imageLoad},
		{"GET /images/get", h.imageSave},
		{"POST /images/prune", h.imagePrune},
		// Names of images have slashes, and net/http's patterns match a rest only at the end.
		{"GET /images/{rest...}", h.byVerb(verbs{"json": h.imageInspect, "history": h.imageHistory, "get": h.imageSave, "attestations": unbuilt("image attestations")})},
		{"POST /images/{rest...}", h.byVerb(verbs{"tag": h.imageTag, "push": unbuilt("pushing an image")})},
		{"DELETE /images/{name...}", h.imageRemove},
		{"GET /distribution/{rest...}", h.byVerb(verbs{"json": h.distribution})},
	}
}

// verbs are handlers by the last segment of a path.
type verbs map[string]handler

// byVerb splits {rest...} into {name} and a verb.
func (h *handlers) byVerb(v verbs) handler {
	return func(w http.ResponseWriter, r *http.Request) error {
		rest := r.PathValue("rest")
		i := strings.LastIndexByte(rest, '/')
		if i <= 0 {
			return notFound("page not found")
		}
		next, ok := v[rest[i+1:]]
		if !ok {
			return notFound("page not found")
		}
		r.SetPathValue("name", rest[:i])
		return next(w, r)
	}
}

func (h *handlers) imageList(w http.ResponseWriter, r *http.Request) error {
	q := r.URL.Query()
	f, err := filtersQuery(q, "before", "dangling", "label", "reference", "since", "until")
	if err != nil {
		return err
	}
	list, err := h.Images.ImageList(r.Context(), boolQuery(q, "all"), f)
	if err != nil {
		return err
	}
	if list == nil {
		list = []image.Summary{}
	}
	return writeJSON(w, http.StatusOK, list)
}

// imageCreate pulls; docker's import hides behind the same path.
func (h *handlers) imageCreate(w http.ResponseWriter, r *http.Request) error {
	q := r.URL.Query()
	if q.Get("fromSrc") != "" {
		return notBuilt("importing an image from a tar file is not built yet: build or load an image instead")
	}
	ref, err := pullRef(q.Get("fromImage"), q.Get("tag"))
	if err != nil {
		return err
	}
	p := &progress{w: w, hold: true}
	return p.finish(h.Images.ImagePull(r.Context(), ref, registryAuth(r), q.Get("platform"), p.emit))
}

// pullRef puts the name and the tag or digest of a pull together.
func pullRef(name, tag string) (string, error) {
	if name == "" {
		return "", invalid("invalid reference: fromImage is empty")
	}
	if len(name)+len(tag) > maxNameBytes {
		return "", invalid("invalid reference: longer than %d bytes", maxNameBytes)
	}
	named, err := reference.ParseNormalizedNamed(strings.TrimSuffix(name, ":"))
	if err != nil {
		return "", invalid("invalid reference format: %q: %v", name, err)
	}
	switch {
	case tag == "" && reference.IsNameOnly(named):
		return "", notBuilt("pulling all tags of %s is not built yet: name one tag", reference.FamiliarName(named))
	case tag == "":
		return name, nil
	case strings.Contains(tag, ":"):
		name = reference.TrimNamed(named).Name() + "@" + tag
	default:
		name = reference.TrimNamed(named).Name() + ":" + tag
	}
	named, err = reference.ParseNormalizedNamed(name)
	if err != nil {
		return "", invalid("invalid reference format: %q: %v", name, err)
	}
	return reference.FamiliarString(named), nil
}

func (h *handlers) imageLoad(w http.ResponseWriter, r *http.Request) error {
	p := &progress{w: w}
	return p.finish(h.Images.ImageLoad(r.Context(), r.Body, p.emit))
}

// imageSave streams a tar file. An error before its first byte has its own status, a later one cuts the connection.
func (h *handlers) imageSave(w http.ResponseWriter, r *http.Request) error {
	refs := r.URL.Query()["names"]
	if name := r.PathValue("name"); name != "" {
		refs = []string{name}
	}
	if len(refs) == 0 {
		return invalid("no images named: give at least one in the query, names=…")
	}
	return h.Images.ImageSave(r.Context(), refs, tarWriter{w})
}

// tarWriter sets the content type with the first byte.
type tarWriter struct{ w http.ResponseWriter }

var _ io.Writer = tarWriter{}

func (t tarWriter) Write(p []byte) (int, error) {
	if !began(t.w) {
		t.w.Header().Set("Content-Type", "application/x-tar")
	}
	return t.w.Write(p)
}

func (h *handlers) imagePrune(w http.ResponseWriter, r *http.Request) error {
	f, err := filtersQuery(r.URL.Query(), "dangling", "label", "label!", "until")
	if err != nil {
		return err
	}
	rep, err := h.Images.ImagePrune(r.Context(), f)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, rep)
}

func (h *handlers) imageInspect(w http.ResponseWriter, r *http.Request) error {
	ref, err := pathRef(r, "name")
	if err != nil {
		return err
	}
	img, err := h.Images.ImageInspect(r.Context(), ref)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, img)
}

func (h *handlers) imageHistory(w http.ResponseWriter, r *http.Request) error {
	ref, err := pathRef(r, "name")
	if err != nil {
		return err
	}
	hist, err := h.Images.ImageHistory(r.Context(), ref)
	if err != nil {
		return err
	}
	if hist == nil {
		hist = []image.HistoryResponseItem{}
	}
	return writeJSON(w, http.StatusOK, hist)
}

func (h *handlers) imageTag(w http.ResponseWriter, r *http.Request) error {
	ref, err := pathRef(r, "name")
	if err != nil {
		return err
	}
	repo, tag := r.URL.Query().Get("repo"), r.URL.Query().Get("tag")
	if repo == "" {
		return invalid("invalid reference: repo is empty")
	}
	if tag != "" {
		repo += ":" + tag
	}
	if _, err := reference.ParseNormalizedNamed(repo); err != nil {
		return invalid("invalid reference format: %q: %v", repo, err)
	}
	if err := h.Images.ImageTag(r.Context(), ref, repo); err != nil {
		return err
	}
	w.WriteHeader(http.StatusCreated)
	return nil
}

func (h *handlers) imageRemove(w http.ResponseWriter, r *http.Request) error {
	ref, err := pathRef(r, "name")
	if err != nil {
		return err
	}
	gone, err := h.Images.ImageRemove(r.Context(), ref, boolQuery(r.URL.Query(), "force"))
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, gone)
}

func (h *handlers) distribution(w http.ResponseWriter, r *http.Request) error {
	ref, err := pathRef(r, "name")
	if err != nil {
		return err
	}
	if _, err := reference.ParseNormalizedNamed(ref); err != nil {
		return invalid("invalid reference format: %q: %v", ref, err)
	}
	d, err := h.Images.Distribution(r.Context(), ref, registryAuth(r))
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, d)
}
