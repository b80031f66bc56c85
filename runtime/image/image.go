// Package image keeps this node's images: references, manifests, layers by digest, and the read-write snapshots of containers. It is
// built on containerd's content store, metadata database and overlay snapshotter, in-process; their one opener is the daemon.
// Used by agent/engine (and, later, runtime/build on the same store).
package image

import (
	"context"
	"io"
	"time"

	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"skein/runtime"
)

// Image is one local image.
type Image struct {
	ID      digest.Digest      // of the config, what docker calls the image ID
	Target  ocispec.Descriptor // manifest or index as pulled
	Tags    []string           // familiar references: "nginx:1.27", "127.0.0.1:5000/web:v1"
	Digests []string           // familiar name@digest
	Created time.Time
	Size    int64         // unpacked bytes of all layers
	Config  ocispec.Image // config file
	// Docker holds what docker's config files say beyond the OCI specification: HEALTHCHECK, SHELL, ONBUILD.
	Docker dockerspec.DockerOCIImageConfigExt
	Labels map[string]string
}

// Auth is a registry credential.
type Auth struct {
	Username, Password, IdentityToken, RegistryToken string
}

// Progress is one step of a pull as docker's JSON stream shows it. Action: "Pulling fs layer", "Downloading", "Download complete",
// "Extracting", "Pull complete", "Already exists".
type Progress struct {
	ID             string // short layer digest
	Action         string
	Current, Total int64
}

// PullOptions of one pull.
type PullOptions struct {
	Auth     *Auth
	Progress func(Progress) // may be nil; called from several goroutines
	Platform string         // "os/arch", empty: this machine's
}

// Store is the node's image store. All methods are safe for concurrent use; errors carry containerd/errdefs kinds and name the image
// and the registry: "pull 127.0.0.1:5000/web:v9: not found in registry 127.0.0.1:5000: check the name and tag".
type Store interface {
	// Pull fetches ref (any form docker accepts; @digest allowed), verifies digests, unpacks, and tags it. Concurrent pulls of one
	// image share the work.
	Pull(ctx context.Context, ref string, o PullOptions) (Image, error)
	// Resolve asks the registry for ref's descriptor without fetching, and the platforms it serves.
	Resolve(ctx context.Context, ref string, auth *Auth) (ocispec.Descriptor, []ocispec.Platform, error)
	// Get finds a local image by reference, ID, unique ID prefix, or name@digest.
	Get(ctx context.Context, ref string) (Image, error)
	List(ctx context.Context) ([]Image, error)
	Tag(ctx context.Context, ref, newRef string) error
	// Remove untags ref, and deletes the image with its last tag; in use by a container (a snapshot's parent): refused unless force
	// only untags. It returns what was untagged and deleted.
	Remove(ctx context.Context, ref string, force bool) (untagged, deleted []string, err error)
	// Load reads a docker-archive or OCI-archive tar.
	Load(ctx context.Context, r io.Reader) ([]Image, error)
	// Save writes a tar that Load and docker load read.
	Save(ctx context.Context, w io.Writer, refs []string) error
	// Prepare makes the read-write snapshot named key over the image's layers (idempotent) and returns its mounts.
	Prepare(ctx context.Context, key string, img Image) ([]runtime.Mount, error)
	// Mounts of an existing snapshot.
	Mounts(ctx context.Context, key string) ([]runtime.Mount, error)
	// RemoveSnapshot deletes the snapshot; unknown key is no error.
	RemoveSnapshot(ctx context.Context, key string) error
	// Snapshots lists keys, for orphan removal.
	Snapshots(ctx context.Context) ([]string, error)
	Close() error
}
