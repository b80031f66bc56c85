package registry

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"crypto/rand"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// serve writes a blob, whole or the range that was asked for.
func (r *Registry) serve(w http.ResponseWriter, q *http.Request, d digest.Digest) {
	f, err := r.blobs.open(d)
	if err != nil {
		failWith(w, err, "BLOB_UNKNOWN")
		return
	}
	defer f.Close()
	w.Header().Set("Docker-Content-Digest", d.String())
	w.Header().Set("Etag", `"`+d.String()+`"`)
	http.ServeContent(w, q, "", time.Time{}, f)
}

func (r *Registry) blob(w http.ResponseWriter, q *http.Request, name, ref string) {
	if q.Method != http.MethodGet && q.Method != http.MethodHead {
		notAllowed(w)
		return
	}
	d := digest.Digest(ref)
	if d.Validate() != nil {
		fail(w, http.StatusBadRequest, "DIGEST_INVALID", "not a digest")
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	r.serve(w, q, d)
}

// upload is a blob on its way in. Its mutex makes the requests of one upload follow each other.
type upload struct {
	mu      sync.Mutex
	name    string
	w       blobWriter
	n       int64
	touched time.Time // guarded by Registry.mu
}

func (r *Registry) upload(w http.ResponseWriter, q *http.Request, name, id string) {
	if id == "" {
		if q.Method != http.MethodPost {
			notAllowed(w)
			return
		}
		r.begin(w, q, name)
		return
	}
	r.mu.Lock()
	u := r.uploads[id]
	if u != nil {
		u.touched = time.Now()
	}
	r.mu.Unlock()
	if u == nil || u.name != name {
		fail(w, http.StatusNotFound, "BLOB_UPLOAD_UNKNOWN", "no such upload: begin again")
		return
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	switch q.Method {
	case http.MethodGet:
		u.answer(w, id, http.StatusNoContent)
	case http.MethodPatch:
		if r.receive(w, q, u) {
			u.answer(w, id, http.StatusAccepted)
		}
	case http.MethodPut:
		if r.receive(w, q, u) {
			r.finish(w, q, id, u)
		}
	case http.MethodDelete:
		r.drop(id, u)
		w.WriteHeader(http.StatusNoContent)
	default:
		notAllowed(w)
	}
}

// begin makes an upload; with a digest the body is the whole blob.
func (r *Registry) begin(w http.ResponseWriter, q *http.Request, name string) {
	v := q.URL.Query()
	if d := digest.Digest(v.Get("mount")); d != "" && d.Validate() == nil && r.blobs.has(d) {
		created(w, name, d)
		return
	}
	bw, err := r.blobs.create()
	if err != nil {
		failWith(w, err, "BLOB_UPLOAD_UNKNOWN")
		return
	}
	id, u := rand.Text(), &upload{name: name, w: bw, touched: time.Now()}
	if !r.add(id, u) {
		bw.abort()
		fail(w, http.StatusTooManyRequests, "TOOMANYREQUESTS", "too many uploads at once: try again later")
		return
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if v.Get("digest") == "" {
		u.answer(w, id, http.StatusAccepted)
		return
	}
	if r.receive(w, q, u) {
		r.finish(w, q, id, u)
		return
	}
	r.drop(id, u)
}

// add registers an upload and drops those that were forgotten.
func (r *Registry) add(id string, u *upload) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for k, o := range r.uploads {
		if time.Since(o.touched) > uploadAge && o.mu.TryLock() {
			o.w.abort()
			delete(r.uploads, k)
			o.mu.Unlock()
		}
	}
	if len(r.uploads) >= maxUploads {
		return false
	}
	r.uploads[id] = u
	return true
}

func (r *Registry) drop(id string, u *upload) {
	u.w.abort()
	r.mu.Lock()
	delete(r.uploads, id)
	r.mu.Unlock()
}

// receive appends the body to the upload; a chunk must begin where the last ended.
func (r *Registry) receive(w http.ResponseWriter, q *http.Request, u *upload) bool {
	if cr := q.Header.Get("Content-Range"); cr != "" {
		first, _, _ := strings.Cut(strings.TrimPrefix(cr, "bytes "), "-")
		if at, err := strconv.ParseInt(first, 10, 64); err != nil || at != u.n {
			w.Header().Set("Range", fmt.Sprintf("0-%d", max(u.n-1, 0)))
			fail(w, http.StatusRequestedRangeNotSatisfiable, "BLOB_UPLOAD_INVALID", "chunk does not follow the last one")
			return false
		}
	}
	n, err := io.Copy(u.w, http.MaxBytesReader(w, q.Body, r.max-u.n))
	u.n += n
	var tooLong *http.MaxBytesError
	switch {
	case err == nil:
		return true
	case errors.As(err, &tooLong):
		fail(w, http.StatusRequestEntityTooLarge, "SIZE_INVALID", fmt.Sprintf("a blob has at most %d bytes", r.max))
	default:
		fail(w, http.StatusInternalServerError, "BLOB_UPLOAD_INVALID", err.Error())
	}
	return false
}

func (r *Registry) finish(w http.ResponseWriter, q *http.Request, id string, u *upload) {
	d := digest.Digest(q.URL.Query().Get("digest"))
	if d.Validate() != nil {
		fail(w, http.StatusBadRequest, "DIGEST_INVALID", "not a digest")
		return
	}
	err := u.w.commit(d)
	r.drop(id, u)
	if errdefs.IsInvalidArgument(err) {
		fail(w, http.StatusBadRequest, "DIGEST_INVALID", err.Error())
		return
	}
	if err != nil {
		failWith(w, err, "BLOB_UPLOAD_UNKNOWN")
		return
	}
	created(w, u.name, d)
}

func created(w http.ResponseWriter, name string, d digest.Digest) {
	w.Header().Set("Docker-Content-Digest", d.String())
	w.Header().Set("Location", "/v2/"+name+"/blobs/"+d.String())
	w.WriteHeader(http.StatusCreated)
}

func (u *upload) answer(w http.ResponseWriter, id string, status int) {
	w.Header().Set("Location", "/v2/"+u.name+"/blobs/uploads/"+id)
	w.Header().Set("Docker-Upload-Uuid", id)
	w.Header().Set("Range", fmt.Sprintf("0-%d", max(u.n-1, 0)))
	w.WriteHeader(status)
}
