package engine

import (
	"context"
	"encoding/json"
	"io"
	"path"
	"sort"
	"strings"
	"time"

	cerrdefs "github.com/containerd/errdefs"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/image"
	"github.com/moby/moby/api/types/jsonstream"
	"github.com/moby/moby/api/types/registry"

	store "skein/runtime/image"

	"skein/agent/dockerapi"
)

func storeAuth(a *registry.AuthConfig) *store.Auth {
	if a == nil || *a == (registry.AuthConfig{}) {
		return nil
	}
	return &store.Auth{Username: a.Username, Password: a.Password, IdentityToken: a.IdentityToken, RegistryToken: a.RegistryToken}
}

// ImagePull pulls ref and reports progress as docker's stream does.
func (e *Engine) ImagePull(ctx context.Context, ref string, auth *registry.AuthConfig, platform string, emit func(jsonstream.Message)) error {
	name, tag, ok := strings.Cut(ref, "@")
	if !ok {
		if i := strings.LastIndex(ref, ":"); i > strings.LastIndex(ref, "/") {
			name, tag = ref[:i], ref[i+1:]
		} else {
			tag = "latest"
		}
	}
	emit(jsonstream.Message{Status: "Pulling from " + strings.TrimPrefix(name, "docker.io/"), ID: tag})
	before, _ := e.cfg.Images.Get(ctx, ref)
	img, err := e.cfg.Images.Pull(ctx, ref, store.PullOptions{Auth: storeAuth(auth), Platform: platform, Progress: func(p store.Progress) {
		m := jsonstream.Message{ID: p.ID, Status: p.Action}
		if p.Total > 0 {
			m.Progress = &jsonstream.Progress{Current: p.Current, Total: p.Total}
		}
		emit(m)
	}})
	if err != nil {
		return err
	}
	emit(jsonstream.Message{Status: "Digest: " + img.Target.Digest.String()})
	if before.ID == img.ID {
		emit(jsonstream.Message{Status: "Status: Image is up to date for " + ref})
	} else {
		emit(jsonstream.Message{Status: "Status: Downloaded newer image for " + ref})
	}
	e.emitImage(img.ID.String(), ref, events.ActionPull)
	return nil
}

func (e *Engine) emitImage(id, name string, action events.Action) {
	e.events.publish(events.Message{Type: events.ImageEventType, Action: action, Actor: events.Actor{ID: id, Attributes: map[string]string{"name": name}}})
}

// ImageList lists local images, newest first.
func (e *Engine) ImageList(ctx context.Context, all bool, f dockerapi.Filters) ([]image.Summary, error) {
	for k := range f {
		if !contains([]string{"reference", "label", "dangling"}, k) {
			return nil, invalid("invalid filter '%s'", k)
		}
	}
	list, err := e.cfg.Images.List(ctx)
	if err != nil {
		return nil, err
	}
	uses := map[string]int64{}
	for _, c := range e.all() {
		uses[c.rec.Image]++
	}
	sort.SliceStable(list, func(i, j int) bool { return list[i].Created.After(list[j].Created) })
	out := []image.Summary{}
	for _, img := range list {
		if !imageMatches(img, f) {
			continue
		}
		target := img.Target
		out = append(out, image.Summary{
			ID: img.ID.String(), RepoTags: orEmpty(img.Tags), RepoDigests: orEmpty(img.Digests), Created: img.Created.Unix(), Size: img.Size,
			SharedSize: -1, Labels: img.Labels, Containers: uses[img.ID.String()], Descriptor: &target,
		})
	}
	return out, nil
}

func orEmpty(s []string) []string {
	if s == nil {
		return []string{}
	}
	return s
}

func imageMatches(img store.Image, f dockerapi.Filters) bool {
	for _, l := range f["label"] {
		if !labelMatches(img.Config.Config.Labels, l) {
			return false
		}
	}
	if d := f["dangling"]; len(d) == 1 && (d[0] == "true" || d[0] == "1") != (len(img.Tags) == 0) {
		return false
	}
	if len(f["reference"]) == 0 {
		return true
	}
	for _, want := range f["reference"] {
		for _, t := range img.Tags {
			if referenceMatches(want, t) {
				return true
			}
		}
	}
	return false
}

// ImageInspect describes one image.
func (e *Engine) ImageInspect(ctx context.Context, ref string) (image.InspectResponse, error) {
	img, err := e.image(ctx, ref)
	if err != nil {
		return image.InspectResponse{}, err
	}
	c := img.Config
	target := img.Target
	out := image.InspectResponse{
		ID: img.ID.String(), RepoTags: orEmpty(img.Tags), RepoDigests: orEmpty(img.Digests), Created: img.Created.Format(time.RFC3339Nano), Author: c.Author,
		Architecture: c.Architecture, Variant: c.Variant, Os: c.OS, OsVersion: c.OSVersion, Size: img.Size, Descriptor: &target,
		Config: &dockerspec.DockerOCIImageConfig{ImageConfig: c.Config, DockerOCIImageConfigExt: img.Docker},
		RootFS: image.RootFS{Type: c.RootFS.Type},
	}
	for _, d := range c.RootFS.DiffIDs {
		out.RootFS.Layers = append(out.RootFS.Layers, d.String())
	}
	return out, nil
}

func (e *Engine) image(ctx context.Context, ref string) (store.Image, error) {
	img, err := e.cfg.Images.Get(ctx, ref)
	if cerrdefs.IsNotFound(err) {
		return img, notFound("No such image: %s", ref)
	}
	return img, err
}

// ImageHistory lists the image's instructions, newest first.
func (e *Engine) ImageHistory(ctx context.Context, ref string) ([]image.HistoryResponseItem, error) {
	img, err := e.image(ctx, ref)
	if err != nil {
		return nil, err
	}
	out := []image.HistoryResponseItem{}
	for i := len(img.Config.History) - 1; i >= 0; i-- {
		h := img.Config.History[i]
		item := image.HistoryResponseItem{ID: "<missing>", CreatedBy: h.CreatedBy, Comment: h.Comment, Tags: []string{}}
		if h.Created != nil {
			item.Created = h.Created.Unix()
		}
		out = append(out, item)
	}
	if len(out) > 0 {
		out[0].ID, out[0].Tags = img.ID.String(), orEmpty(img.Tags)
	}
	return out, nil
}

// ImageTag gives the image a further name.
func (e *Engine) ImageTag(ctx context.Context, ref, newRef string) error {
	img, err := e.image(ctx, ref)
	if err != nil {
		return err
	}
	if err := e.cfg.Images.Tag(ctx, ref, newRef); err != nil {
		return err
	}
	e.emitImage(img.ID.String(), newRef, events.ActionTag)
	return nil
}

// ImageRemove untags, and deletes with the last tag.
func (e *Engine) ImageRemove(ctx context.Context, ref string, force bool) ([]image.DeleteResponse, error) {
	img, err := e.image(ctx, ref)
	if err != nil {
		return nil, err
	}
	last := len(img.Tags) <= 1 || strings.HasPrefix(img.ID.Encoded(), strings.TrimPrefix(ref, "sha256:"))
	for _, c := range e.all() {
		r := c.snapshot()
		if r.Image != img.ID.String() || !last {
			continue
		}
		if r.State.active() {
			return nil, conflict("conflict: unable to delete %s (cannot be forced) - image is being used by running container %s", ref, r.ID[:12])
		}
		if !force {
			return nil, conflict("conflict: unable to remove repository reference %q (must force) - container %s is using its referenced image %s", ref, r.ID[:12], img.ID.Encoded()[:12])
		}
	}
	untagged, deleted, err := e.cfg.Images.Remove(ctx, ref, force)
	if err != nil {
		return nil, err
	}
	out := []image.DeleteResponse{}
	for _, u := range untagged {
		out = append(out, image.DeleteResponse{Untagged: u})
		e.emitImage(img.ID.String(), u, events.ActionUnTag)
	}
	for _, d := range deleted {
		out = append(out, image.DeleteResponse{Deleted: d})
		e.emitImage(d, d, events.ActionDelete)
	}
	return out, nil
}

// ImageLoad reads a docker or OCI archive.
func (e *Engine) ImageLoad(ctx context.Context, r io.Reader, emit func(jsonstream.Message)) error {
	list, err := e.cfg.Images.Load(ctx, r)
	if err != nil {
		return err
	}
	for _, img := range list {
		if len(img.Tags) == 0 {
			emit(jsonstream.Message{Stream: "Loaded image ID: " + img.ID.String() + "\n"})
		}
		for _, t := range img.Tags {
			emit(jsonstream.Message{Stream: "Loaded image: " + t + "\n"})
		}
		e.emitImage(img.ID.String(), img.ID.String(), events.ActionLoad)
	}
	return nil
}

// ImageSave writes a docker archive.
func (e *Engine) ImageSave(ctx context.Context, refs []string, w io.Writer) error {
	for _, r := range refs {
		if _, err := e.image(ctx, r); err != nil {
			return err
		}
	}
	return e.cfg.Images.Save(ctx, w, refs)
}

// Distribution asks the registry what ref is, for clients that pin digests.
func (e *Engine) Distribution(ctx context.Context, ref string, auth *registry.AuthConfig) (registry.DistributionInspect, error) {
	d, platforms, err := e.cfg.Images.Resolve(ctx, ref, storeAuth(auth))
	if err != nil {
		return registry.DistributionInspect{}, err
	}
	return registry.DistributionInspect{Descriptor: d, Platforms: platforms}, nil
}

// mustJSON encodes our own plain types, which cannot fail.
func mustJSON(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return b
}

// referenceMatches reports whether tag ("127.0.0.1:5000/web:v1") matches docker's reference filter: a name, name:tag, or a glob.
func referenceMatches(pattern, tag string) bool {
	repo := tag
	if i := strings.LastIndex(tag, ":"); i > strings.LastIndex(tag, "/") {
		repo = tag[:i]
	}
	for _, candidate := range []string{tag, repo} {
		if ok, err := path.Match(pattern, candidate); err == nil && ok {
			return true
		}
	}
	return false
}
