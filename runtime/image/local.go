package image

import (
	"context"
	"fmt"
	"slices"
	"sort"
	"strings"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

// entry is an image with the names of its records.
type entry struct {
	img     Image
	details *details
	records []string
}

// entries gathers all records by image ID.
func (s *store) entries(ctx context.Context) ([]*entry, error) {
	all, err := s.images.List(ctx)
	if err != nil {
		return nil, err
	}
	byID := map[digest.Digest]*entry{}
	var out []*entry
	for _, r := range all {
		d, err := s.describe(ctx, r.Target)
		if err != nil {
			// One damaged image must not hide the others.
			s.log.Warn("image cannot be read", "image", r.Name, "error", err)
			continue
		}
		e := byID[d.configD.Digest]
		if e == nil {
			e = newEntry(r, d)
			byID[d.configD.Digest] = e
			out = append(out, e)
		}
		e.add(r)
	}
	for _, e := range out {
		sort.Strings(e.img.Tags)
		sort.Strings(e.img.Digests)
		e.img.Digests = slices.Compact(e.img.Digests)
	}
	sort.SliceStable(out, func(i, j int) bool { return out[i].img.Created.After(out[j].img.Created) })
	return out, nil
}

func newEntry(r images.Image, d *details) *entry {
	e := &entry{details: d, img: Image{ID: d.configD.Digest, Target: r.Target, Config: d.config, Docker: d.docker, Labels: d.config.Config.Labels, Size: d.size}}
	if d.config.Created != nil {
		e.img.Created = *d.config.Created
	}
	return e
}

func (e *entry) add(r images.Image) {
	e.records = append(e.records, r.Name)
	repo, tag, dgst := splitRecord(r.Name)
	if repo == "" {
		return
	}
	if dgst == "" {
		dgst = r.Target.Digest
	}
	if tag != "" {
		e.img.Tags = append(e.img.Tags, repo+":"+tag)
	}
	e.img.Digests = append(e.img.Digests, repo+"@"+dgst.String())
}

// List implements Store.
func (s *store) List(ctx context.Context) ([]Image, error) {
	es, err := s.entries(s.scope(ctx))
	if err != nil {
		return nil, fmt.Errorf("list images: %w", err)
	}
	out := make([]Image, len(es))
	for i, e := range es {
		out[i] = e.img
	}
	return out, nil
}

// Get implements Store.
func (s *store) Get(ctx context.Context, ref string) (Image, error) {
	e, _, err := s.find(s.scope(ctx), ref)
	if err != nil {
		return Image{}, wrap("image", ref, err)
	}
	return e.img, nil
}

// find looks ref up as docker does: a full ID, then a name, then the beginning of an ID. record is the record that ref names, if it is
// a name.
func (s *store) find(ctx context.Context, ref string) (_ *entry, record string, err error) {
	es, err := s.entries(ctx)
	if err != nil {
		return nil, "", err
	}
	prefix, maybeID := asID(ref)
	if maybeID && len(prefix) == 64 {
		if e := byPrefix(es, prefix); len(e) == 1 {
			return e[0], "", nil
		}
	}
	named, nameErr := parseRef(ref)
	if nameErr == nil && !strings.HasPrefix(ref, "sha256:") {
		if e, record := byName(es, named); e != nil {
			return e, record, nil
		}
	}
	if maybeID {
		switch e := byPrefix(es, prefix); len(e) {
		case 0:
		case 1:
			return e[0], "", nil
		default:
			return nil, "", kind(errdefs.ErrInvalidArgument, "%d images have an ID that begins so: write more of it", len(e))
		}
	} else if nameErr != nil {
		return nil, "", nameErr
	}
	return nil, "", kind(errdefs.ErrNotFound, "no such image on this node: pull it first")
}

func byPrefix(es []*entry, prefix string) (out []*entry) {
	for _, e := range es {
		if strings.HasPrefix(e.img.ID.Encoded(), prefix) {
			out = append(out, e)
		}
	}
	return out
}

func byName(es []*entry, named reference.Named) (*entry, string) {
	name := recordName(named)
	for _, e := range es {
		if slices.Contains(e.records, name) {
			return e, name
		}
	}
	d, ok := named.(reference.Digested)
	if !ok {
		return nil, ""
	}
	// name@digest of something that was pulled by tag
	want := reference.FamiliarName(named) + "@" + d.Digest().String()
	for _, e := range es {
		if slices.Contains(e.img.Digests, want) || (e.details.manifest.Digest == d.Digest() && e.hasRepo(reference.FamiliarName(named))) {
			return e, ""
		}
	}
	return nil, ""
}

func (e *entry) hasRepo(repo string) bool {
	for _, r := range e.records {
		if have, _, _ := splitRecord(r); have == repo {
			return true
		}
	}
	return false
}

// Tag implements Store.
func (s *store) Tag(ctx context.Context, ref, newRef string) error {
	ctx = s.scope(ctx)
	named, err := parseRef(newRef)
	if err == nil {
		if _, ok := named.(reference.Digested); ok {
			err = kind(errdefs.ErrInvalidArgument, "a digest cannot be given, it follows from the image")
		}
	}
	if err != nil {
		return wrap("tag", newRef, err)
	}
	s.names.Lock()
	defer s.names.Unlock()
	e, _, err := s.find(ctx, ref)
	if err != nil {
		return wrap("tag", ref, err)
	}
	if err := s.setName(ctx, recordName(named), e.img.Target); err != nil {
		return wrap("tag", newRef, diskError(s.root, err))
	}
	return nil
}

// Remove implements Store.
func (s *store) Remove(ctx context.Context, ref string, force bool) (untagged, deleted []string, err error) {
	untagged, deleted, err = s.remove(s.scope(ctx), ref, force)
	if err != nil {
		return nil, nil, wrap("remove", ref, err)
	}
	return untagged, deleted, nil
}

func (s *store) remove(ctx context.Context, ref string, force bool) (untagged, deleted []string, err error) {
	s.names.Lock()
	defer s.names.Unlock()
	e, record, err := s.find(ctx, ref)
	if err != nil {
		return nil, nil, err
	}
	if record != "" && len(e.records) > 1 {
		return []string{familiar(record)}, nil, s.images.Delete(ctx, record)
	}
	if record == "" && !force && e.repositories() > 1 {
		return nil, nil, kind(errdefs.ErrConflict, "image %s has names in several repositories (%s): remove the names, or force",
			shortID(e.img.ID), strings.Join(e.img.Tags, ", "))
	}
	users, err := s.users(ctx, e.img.ID)
	if err != nil {
		return nil, nil, err
	}
	if len(users) > 0 {
		if !force {
			return nil, nil, kind(errdefs.ErrConflict, "image is being used by %s: remove the container first, or force to take only the name away",
				strings.Join(users[:min(len(users), 5)], ", "))
		}
		if err := s.createDangling(ctx, e.img.Target); err != nil {
			return nil, nil, err
		}
	}
	for _, r := range e.records {
		if strings.HasPrefix(r, danglingPrefix) {
			if len(users) > 0 {
				continue
			}
		} else {
			untagged = append(untagged, familiar(r))
		}
		if err := s.images.Delete(ctx, r); err != nil && !errdefs.IsNotFound(err) {
			return untagged, nil, err
		}
	}
	s.details.drop()
	if len(users) > 0 {
		return untagged, nil, nil
	}
	deleted, err = s.purge(ctx, e)
	return untagged, deleted, err
}

// repositories counts those in which the image has names.
func (e *entry) repositories() int {
	seen := map[string]bool{}
	for _, r := range e.records {
		if repo, _, _ := splitRecord(r); repo != "" {
			seen[repo] = true
		}
	}
	return len(seen)
}

// purge collects now and tells which of the image's parts are gone.
func (s *store) purge(ctx context.Context, e *entry) ([]string, error) {
	if err := s.collect(ctx); err != nil {
		return nil, err
	}
	deleted := []string{e.img.ID.String()}
	for i := len(e.details.chain) - 1; i >= 0; i-- {
		c := e.details.chain[i].String()
		if _, err := s.snaps.Stat(ctx, c); errdefs.IsNotFound(err) {
			deleted = append(deleted, c)
		}
	}
	return deleted, nil
}
