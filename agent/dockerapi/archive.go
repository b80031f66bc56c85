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
	// ContainerChanges emits what the container changed of its image's files, a directory before what is in it.
	ContainerChanges(ctx context.Context, ref string, emit func(container.FilesystemChange) error) error
	// ContainerExport calls begin, then writes the root filesystem as a tar stream, without what is mounted in it.
	ContainerExport(ctx context.Context, ref string, begin func() io.Writer) error
}

// ArchiveOptions of an extraction.
type ArchiveOptions struct {
	NoOverwriteDirNonDir bool // a directory never takes a file's place, nor the reverse
	CopyUIDGID           bool // files get the container's user as owner
}

// maxChanges bounds the list of one container's changes, which is held in memory.
const maxChanges = 5_000_000

const pathStatHeader = "X-Docker-Container-Path-Stat"

func (h *handlers) archiveRoutes() []route {
	if h.Archives == nil {
		return nil
	}
	return []route{
		{"HEAD /containers/{id}/archive", h.archiveStat},
		{"GET /containers/{id}/archive", h.archiveGet},
		{"PUT /containers/{id}/archive", h.archivePut},
		{"GET /containers/{id}/changes", h.containerChanges},
		{"GET /containers/{id}/export", h.containerExport},
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

func (h *handlers) containerChanges(w http.ResponseWriter, r *http.Request) error {
	ref, err := pathRef(r, "id")
	if err != nil {
		return err
	}
	changes := []container.FilesystemChange{}
	err = h.Archives.ContainerChanges(r.Context(), ref, func(c container.FilesystemChange) error {
		if len(changes) == maxChanges {
			return invalid("container %s changed more than %d files", ref, maxChanges)
		}
		changes = append(changes, c)
		return nil
	})
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, changes)
}

func (h *handlers) containerExport(w http.ResponseWriter, r *http.Request) error {
	ref, err := pathRef(r, "id")
	if err != nil {
		return err
	}
	return h.Archives.ContainerExport(r.Context(), ref, func() io.Writer {
		w.Header().Set("Content-Type", "application/octet-stream")
		return w
	})
}
