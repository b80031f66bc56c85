package control_test

import (
	"encoding/base64"
	"fmt"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
)

func TestDependencies(t *testing.T) {
	f := setup(t)
	create := func(kind, name, data, more string) (string, error) {
		spec := fmt.Sprintf(`{"Name":%q,"Labels":{"app":"x"},"Data":%q%s}`, name, base64.StdEncoding.EncodeToString([]byte(data)), more)
		r, err := f.srv.CreateDependency(t.Context(), &api.DependencyRequest{Kind: kind, SpecJson: []byte(spec)})
		return r.GetId(), err
	}
	secret, err := create("secret", "password", "hunter2", "")
	f.ok(err)
	config, err := create("config", "password", "not the same", "") // names of one kind do not clash with the other's
	f.ok(err)
	for _, tc := range []struct {
		kind, name, data, more string
		is                     func(error) bool
		want                   string
	}{
		{"secret", "password", "again", "", errdefs.IsAlreadyExists, "secret password already exists"},
		{"secret", "", "x", "", errdefs.IsInvalidArgument, "invalid secret name"},
		{"secret", "-x", "x", "", errdefs.IsInvalidArgument, "invalid secret name"},
		{"secret", strings.Repeat("x", 65), "x", "", errdefs.IsInvalidArgument, "invalid secret name"},
		{"secret", "empty", "", "", errdefs.IsInvalidArgument, "larger than 0 and less than 512000"},
		{"secret", "big", strings.Repeat("x", 512000), "", errdefs.IsInvalidArgument, "larger than 0 and less than 512000"},
		{"config", "big", strings.Repeat("x", 1024000), "", errdefs.IsInvalidArgument, "larger than 0 and less than 1024000"},
		{"secret", "driven", "x", `,"Driver":{"Name":"vault"}`, errdefs.IsNotImplemented, "vault"},
		{"config", "t", "x", `,"Templating":{"Name":"jinja"}`, errdefs.IsInvalidArgument, "jinja"},
		{"config", "t", "x", `,"Colour":1`, errdefs.IsInvalidArgument, "Colour"},
		{"token", "t", "x", "", errdefs.IsInvalidArgument, "unknown kind"},
	} {
		if _, err := create(tc.kind, tc.name, tc.data, tc.more); err == nil || !tc.is(err) || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s %.20q of %d bytes%s: %v", tc.kind, tc.name, len(tc.data), tc.more, err)
		}
	}
	if _, err := create("config", "large", strings.Repeat("x", 1023999), ""); err != nil {
		t.Errorf("the largest config: %v", err)
	}

	o, err := f.srv.GetDependency(t.Context(), &api.DependencyRequest{Kind: "secret", Ref: "password"})
	if s := get[swarm.Secret](f, o, err); s.ID != secret || s.Spec.Data != nil || s.Version.Index == 0 || strings.Contains(string(o.Json), "aHVudGVyMg") {
		t.Errorf("the secret is shown as %s", o.Json)
	}
	o, err = f.srv.GetDependency(t.Context(), &api.DependencyRequest{Kind: "config", Ref: config[:5]})
	shown := get[swarm.Config](f, o, err)
	if string(shown.Spec.Data) != "not the same" {
		t.Errorf("the config is shown as %s", o.Json)
	}
	update := func(version uint64, spec string) error {
		_, err := f.srv.UpdateDependency(t.Context(), &api.DependencyRequest{Kind: "config", Ref: config, Version: version, SpecJson: []byte(spec)})
		return err
	}
	if err := update(shown.Version.Index, `{"Name":"password","Data":"eA=="}`); !errdefs.IsInvalidArgument(err) {
		t.Errorf("new content: %v", err)
	}
	f.ok(update(shown.Version.Index, `{"Name":"password","Labels":{"a":"b"}}`))
	if err := update(shown.Version.Index, `{"Name":"password"}`); !errdefs.IsConflict(err) {
		t.Errorf("an old version: %v", err)
	}
	list := func(want int, kind string, pairs ...string) {
		t.Helper()
		o, err := f.srv.ListDependencies(t.Context(), &api.DependencyListRequest{Kind: kind, Filters: filter(pairs...)})
		f.ok(err)
		if len(o.Json) != want {
			t.Errorf("%s %v: %d, want %d", kind, pairs, len(o.Json), want)
		}
	}
	list(1, "secret")
	list(2, "config")
	list(1, "config", "label", "a=b")
	list(1, "config", "name", "lar")
	list(0, "config", "names", "lar")
	list(1, "secret", "id", secret[:4])

	service := func(secretID string) string {
		return fmt.Sprintf(`{"Name":"web","TaskTemplate":{"ContainerSpec":{"Image":"i","Secrets":[{"SecretID":%q,"SecretName":"password","File":{"Name":"pw","UID":"0","GID":"0","Mode":292}}]}}}`, secretID)
	}
	if _, err := f.srv.CreateService(t.Context(), &api.CreateRequest{SpecJson: []byte(service("gone"))}); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "secret password not found") {
		t.Errorf("a service with a secret that is not there: %v", err)
	}
	if _, err := f.srv.CreateService(t.Context(), &api.CreateRequest{SpecJson: []byte(service(config))}); !errdefs.IsNotFound(err) {
		t.Errorf("a service with a config as secret: %v", err)
	}
	id := f.create(service(secret))
	remove := func() error {
		_, err := f.srv.RemoveDependency(t.Context(), &api.DependencyRequest{Kind: "secret", Ref: "password"})
		return err
	}
	if err := remove(); !errdefs.IsInvalidArgument(err) || err.Error() != "secret 'password' is in use by the following service: web" {
		t.Errorf("remove what is in use: %v", err)
	}
	_, err = f.srv.RemoveService(t.Context(), &api.RemoveRequest{Ref: id})
	f.ok(err)
	f.ok(remove())
	if err := remove(); !errdefs.IsNotFound(err) {
		t.Errorf("remove it twice: %v", err)
	}
}
