package image

import (
	"context"
	"fmt"
	"os"
	"sort"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"skein/runtime"
	"skein/runtime/layer"
)

// labelImage marks the snapshots of containers and says which image is below.
const labelImage = "skein/image"

// Prepare implements Store. An image without layers has one bind mount instead of an overlay.
func (s *store) Prepare(ctx context.Context, key string, img Image) ([]runtime.Mount, error) {
	ms, err := s.prepare(s.scope(ctx), key, img)
	if err != nil {
		return nil, fmt.Errorf("prepare root filesystem of %s: %w", key, diskError(s.root, err))
	}
	return ms, nil
}

func (s *store) prepare(ctx context.Context, key string, img Image) ([]runtime.Mount, error) {
	if key == "" || len(key) > 200 || strings.ContainsAny(key, " /\x00") {
		return nil, kind(errdefs.ErrInvalidArgument, "key %.200q is no name", key)
	}
	s.names.RLock()
	defer s.names.RUnlock()
	d, err := s.describe(ctx, img.Target)
	if err != nil {
		return nil, err
	}
	mounts, err := s.snaps.Prepare(ctx, key, d.top(), snapshots.WithLabels(map[string]string{
		"containerd.io/gc.root": time.Now().UTC().Format(time.RFC3339), labelImage: d.configD.Digest.String()}))
	if errdefs.IsAlreadyExists(err) {
		info, err := s.snaps.Stat(ctx, key)
		if err != nil {
			return nil, err
		}
		if info.Labels[labelImage] != d.configD.Digest.String() {
			return nil, kind(errdefs.ErrAlreadyExists, "exists with another image")
		}
		return s.mounts(ctx, key)
	}
	if errdefs.IsNotFound(err) {
		return nil, fmt.Errorf("layers of image %s are gone: pull it again: %w", shortID(img.ID), err)
	}
	if err != nil {
		return nil, err
	}
	if err := likeBelow(mounts); err != nil {
		return nil, err
	}
	return toRuntime(mounts)
}

// likeBelow gives the new top directory the attributes of the image's root: overlayfs shows those of the top.
func likeBelow(mounts []mount.Mount) error {
	upper, lowers, err := directories(mounts)
	if err != nil || len(lowers) == 0 {
		return err
	}
	to, err := os.Open(upper)
	if err != nil {
		return err
	}
	defer to.Close()
	from, err := os.Open(lowers[0])
	if err != nil {
		return err
	}
	defer from.Close()
	return layer.CopyDirMeta(int(to.Fd()), int(from.Fd()))
}

// Mounts implements Store.
func (s *store) Mounts(ctx context.Context, key string) ([]runtime.Mount, error) {
	ms, err := s.mounts(s.scope(ctx), key)
	if err != nil {
		return nil, fmt.Errorf("mounts of %s: %w", key, err)
	}
	return ms, nil
}

func (s *store) mounts(ctx context.Context, key string) ([]runtime.Mount, error) {
	ms, err := s.snaps.Mounts(ctx, key)
	if err != nil {
		return nil, err
	}
	return toRuntime(ms)
}

// maxMountData is what mount(2) takes: a page with its final zero.
const maxMountData = 4096 - 1

func toRuntime(ms []mount.Mount) ([]runtime.Mount, error) {
	out := make([]runtime.Mount, len(ms))
	for i, m := range ms {
		if len(strings.Join(m.Options, ",")) > maxMountData {
			return nil, kind(errdefs.ErrFailedPrecondition, "the image's layers do not fit into one mount: use a state directory with a shorter path")
		}
		out[i] = runtime.Mount{Type: m.Type, Source: m.Source, Options: m.Options}
	}
	return out, nil
}

// RemoveSnapshot implements Store. The files go a moment later, the key at once.
func (s *store) RemoveSnapshot(ctx context.Context, key string) error {
	if err := s.snaps.Remove(s.scope(ctx), key); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("remove root filesystem of %s: %w", key, err)
	}
	s.sweepSoon()
	return nil
}

// Snapshots implements Store.
func (s *store) Snapshots(ctx context.Context) ([]string, error) {
	var keys []string
	err := s.snaps.Walk(s.scope(ctx), func(_ context.Context, i snapshots.Info) error {
		if i.Kind == snapshots.KindActive && i.Labels[labelImage] != "" {
			keys = append(keys, i.Name)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list root filesystems: %w", err)
	}
	sort.Strings(keys)
	return keys, nil
}

// users lists the containers that stand on an image.
func (s *store) users(ctx context.Context, id digest.Digest) ([]string, error) {
	var keys []string
	err := s.snaps.Walk(ctx, func(_ context.Context, i snapshots.Info) error {
		if i.Labels[labelImage] == id.String() {
			keys = append(keys, i.Name)
		}
		return nil
	})
	return keys, err
}
