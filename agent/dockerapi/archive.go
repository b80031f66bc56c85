package dockerapi

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"io"
	"net/http"

	"github.com/moby/moby/api/types/container"
)

// Archives copies files from and to containers, running or not.
type Archives interface {
	// ArchiveStat describes a path; a link at its end is not followed.
	ArchiveStat(ctx context.Context, ref, path string) (container.PathStat, error)
	// ArchiveGet calls begin with what the path is, then writes it to the returned writer as a tar stream.
	ArchiveGet(ctx context.Context, ref, path string, begin func(container.PathStat) (io.Writer, error)) error
	// ArchivePut extracts a tar stream, compressed or not, into the directory path.
	ArchivePut(ctx context.Context, ref, path string, o ArchiveOptions, r io.Reader) error
}

// ArchiveOptions of an extraction.
type ArchiveOptions struct {
	NoOverwriteDirNonDir bool // a directory never takes a file's place, nor the reverse
	CopyUIDGID           bool // files get the container's user as owner
}

const pathStatHeader = "X-Docker-Container-Path-Stat"

func (h *handlers) archiveRoutes() []route {
	if h.Archives == nil {
		return nil
	}
	return []route{
		{"HEAD /containers/{id}/archive", h.archiveStat},
		{"GET /containers/{id}/archive", h.archiveGet},
		{"PUT /containers/{id}/archive", h.archivePut},
	}
}

func archiveRef(r *http.Request) (ref, path string, err error) {
	if ref, err = pathRef(r, "id"); err != nil {
		return "", "", err
	}
	path = r.URL.Query().Get("path")
	if path == "" {
		return "", "", invalid("missing parameter: path")
	}
	if len(path) > maxNameBytes {
		return "", "", invalid("the path is longer than %d bytes", maxNameBytes)
	}
	return ref, path, nil
}

func setPathStat(w http.ResponseWriter, st container.PathStat) error {
	b, err := json.Marshal(st)
	if err != nil {
		return err
	}
	w.Header().Set(pathStatHeader, base64.StdEncoding.EncodeToString(b))
	return nil
}

func (h *handlers) archiveStat(w http.ResponseWriter, r *http.Request) error {
	ref, path, err := archiveRef(r)
	if err != nil {
		return err
	}
	st, err := h.Archives.ArchiveStat(r.Context(), ref, path)
	if err != nil {
		return err
	}
	if err := setPathStat(w, st); err != nil {
		return err
	}
	w.WriteHeader(http.StatusOK)
	return nil
}

func (h *handlers) archiveGet(w http.ResponseWriter, r *http.Request) error {
	ref, path, err := archiveRef(r)
	if err != nil {
		return err
	}
	return h.Archives.ArchiveGet(r.Context(), ref, path, func(st container.PathStat) (io.Writer, error) {
		w.Header().Set("Content-Type", "application/x-tar")
		return w, setPathStat(w, st)
	})
}

func (h *handlers) archivePut(w http.ResponseWriter, r *http.Request) error {
	ref, path, err := archiveRef(r)
	if err != nil {
		return err
	}
	q := r.URL.Query()
	o := ArchiveOptions{NoOverwriteDirNonDir: boolQuery(q, "noOverwriteDirNonDir"), CopyUIDGID: boolQuery(q, "copyUIDGID")}
	if err := h.Archives.ArchivePut(r.Context(), ref, path, o, r.Body); err != nil {
		return err
	}
	w.WriteHeader(http.StatusOK)
	return nil
}
