package control_test

import (
	"encoding/base64"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"

	"skein/manager/api"
	"skein/manager/store"
)

// level raises the cluster's feature level.
func (f *fixture) level(n uint32) {
	var c *api.ClusterRecord
	f.st.View(func(tx store.ReadTx) { c = proto.Clone(tx.Cluster()).(*api.ClusterRecord) })
	c.FeatureLevel = n
	f.put(&api.Change{Kind: &api.Change_PutCluster{PutCluster: c}})
}

// Credentials belong to a revision: an update without any keeps them, a rollback returns to those of the revision it returns to, and nothing
// shows them.
func TestRegistryCredentials(t *testing.T) {
	f := setup(t)
	f.level(1)
	header := func(json string) string { return base64.URLEncoding.EncodeToString([]byte(json)) }
	alice, bob := `{"username":"alice","password":"hunter2","serveraddress":"r.example"}`, `{"username":"bob","password":"swordfish"}`
	spec := func(image string) []byte {
		return []byte(`{"Name":"web","TaskTemplate":{"ContainerSpec":{"Image":"r.example/` + image + `"}}}`)
	}
	create := func(auth string) error {
		_, err := f.srv.CreateService(t.Context(), &api.CreateRequest{SpecJson: spec("a"), RegistryAuth: auth})
		return err
	}
	if err := create(header(alice)); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("with managers of an older version: %v", err)
	}
	f.level(api.FeatureLevel)
	for _, broken := range []string{"hunter2!", header(`"hunter2"`), header(`{"username":5,"password":"hunter2"}`), header(`{"auth":"hunter2"}`), header(`{"password":"` + strings.Repeat("hunter2", 4000) + `"}`)} {
		if err := create(broken); !errdefs.IsInvalidArgument(err) || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("broken credentials: %v, want them refused and not repeated", err)
		}
	}
	f.ok(create(header(alice)))
	update := func(image, auth, from, rollback string) {
		t.Helper()
		_, err := f.srv.UpdateService(t.Context(), &api.UpdateRequest{Ref: "web", Version: f.service("web").Version.Index, SpecJson: spec(image), RegistryAuth: auth, RegistryAuthFrom: from, Rollback: rollback})
		f.ok(err)
	}
	want := func(what, user string, revision uint64) {
		t.Helper()
		f.st.View(func(tx store.ReadTx) {
			svc, err := tx.FindService("web")
			f.ok(err)
			have := string(svc.RegistryAuth(svc.Revision))
			if (user == "") != (have == "") || !strings.Contains(have, user) || svc.Revision != revision || len(svc.ServiceRecord.RegistryAuth) > 0 {
				t.Errorf("%s: revision %d with %q; want %d with those of %q", what, svc.Revision, have, revision, user)
			}
		})
	}
	want("created", "alice", 1)
	update("b", "", "", "")
	want("an update without", "alice", 2)
	update("c", header(bob), "", "")
	want("an update with others", "bob", 3)
	update("c", "", "", "")
	want("nothing changed", "bob", 3)
	update("c", header(alice), "", "")
	want("others, and the same spec", "alice", 3)
	update("c", header(bob), "", "")
	update("d", "", "previous-spec", "")
	want("those of the revision before the current one", "alice", 4)
	update("e", header(`{}`), "", "")
	want("none", "", 5)
	update("", "", "", "previous")
	want("rolled back", "alice", 6)
	update("c", "", "", "")
	want("a spec that was there before", "bob", 7)

	for _, o := range []*api.Object{must(f.srv.GetService(t.Context(), &api.GetRequest{Ref: "web"})), must(f.srv.GetService(t.Context(), &api.GetRequest{Ref: "web", InsertDefaults: true}))} {
		if s := string(o.Json); strings.Contains(s, "hunter2") || strings.Contains(s, "swordfish") {
			t.Errorf("the service shows credentials: %s", s)
		}
	}
	for _, list := range []*api.Objects{must(f.srv.ListServices(t.Context(), &api.ListRequest{})), must(f.srv.ListTasks(t.Context(), &api.ListRequest{}))} {
		for _, b := range list.Json {
			if s := string(b); strings.Contains(s, "hunter2") || strings.Contains(s, "swordfish") {
				t.Errorf("a list shows credentials: %s", s)
			}
		}
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}
