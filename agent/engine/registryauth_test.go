package engine

import (
	"context"
	"testing"

	cerrdefs "github.com/containerd/errdefs"

	"skein/manager/api"
	"skein/runtime/image"
)

// pulling notes what an image is asked for with; there is no image.
type pulling struct {
	*fakeImages
	auth *image.Auth
}

func (p *pulling) Pull(_ context.Context, _ string, o image.PullOptions) (image.Image, error) {
	p.auth = o.Auth
	return image.Image{}, cerrdefs.ErrNotFound
}

// A task's image is asked for with the credentials that came with the task.
func TestTaskPullsWithItsCredentials(t *testing.T) {
	b := newBench(t)
	for sent, want := range map[string]*image.Auth{"": nil, `{"username":"u","password":"p","serveraddress":"r.example"}`: {Username: "u", Password: "p"}, `{"identitytoken":"t"}`: {IdentityToken: "t"}} {
		p := &pulling{fakeImages: b.images}
		b.e.cfg.Images = p
		c, err := b.e.Controller(&api.Assignment{TaskId: "t1", SpecJson: []byte(`{"ContainerSpec":{"Image":"r.example/app"}}`), RegistryAuth: []byte(sent)}, nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Prepare(t.Context()); err == nil {
			t.Fatal("there is an image")
		}
		if (want == nil) != (p.auth == nil) || want != nil && *want != *p.auth {
			t.Errorf("credentials %s: pulled with %v, want %v", sent, p.auth, want)
		}
	}
}
