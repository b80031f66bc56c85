package control_test

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
	"skein/manager/authz"
	"skein/manager/control"
	"skein/manager/store"
)

func (f *fixture) raiseLevel() {
	f.t.Helper()
	var c *api.ClusterRecord
	f.st.View(func(tx store.ReadTx) { c = tx.Cluster() })
	next := &api.ClusterRecord{Id: c.Id, SpecJson: c.SpecJson, CaCertPem: c.CaCertPem, CaKeyPem: c.CaKeyPem, WorkerToken: c.WorkerToken, ManagerToken: c.ManagerToken,
		OverlayPool: c.OverlayPool, MeshPool: c.MeshPool, UlaPrefix: c.UlaPrefix, OverlayBits: c.OverlayBits, DataPort: c.DataPort, FeatureLevel: api.FeatureLevel}
	f.put(&api.Change{Kind: &api.Change_PutCluster{PutCluster: next}})
}

func (f *fixture) revisions(r *api.RevisionsRequest) (out []control.Revision) {
	f.t.Helper()
	list, err := f.srv.ListRevisions(f.t.Context(), r)
	f.ok(err)
	for _, b := range list.Json {
		var one control.Revision
		f.ok(json.Unmarshal(b, &one))
		out = append(out, one)
	}
	return out
}

func TestRevisions(t *testing.T) {
	f := setup(t)
	f.raiseLevel()
	ctx := authz.WithCaller(t.Context(), authz.Caller{NodeIdentity: api.NodeIdentity{NodeID: "n1"}})
	version := func() uint64 {
		o, err := f.srv.GetService(ctx, &api.GetRequest{Ref: "web"})
		return get[swarm.Service](f, o, err).Version.Index
	}
	spec := func(image, comment string) []byte {
		return fmt.Appendf(nil, `{"Name":"web","Labels":{"skein.comment":%q},"TaskTemplate":{"ContainerSpec":{"Image":%q}}}`, comment, image)
	}
	created, err := f.srv.CreateService(ctx, &api.CreateRequest{SpecJson: spec("web:1", "begin")})
	f.ok(err)
	for i, comment := range []string{"begin", "newer", "newest"} {
		_, err := f.srv.UpdateService(ctx, &api.UpdateRequest{Ref: "web", Version: version(), SpecJson: spec(fmt.Sprint("web:", i+2), comment)})
		f.ok(err)
	}
	got := f.revisions(&api.RevisionsRequest{Ref: created.Id[:8]})
	if len(got) != 4 || got[0].Number != 4 || !got[0].Current || got[0].Author != "node n1" || got[0].Comment != "newest" || got[0].CreatedAt.IsZero() || got[0].Spec != nil {
		t.Fatalf("history %+v", got)
	}
	if got[3].Changes != nil || got[3].Comment != "begin" || got[2].Comment != "" {
		t.Errorf("the first revision has changes, or a comment is repeated: %+v", got)
	}
	want := control.RevisionChange{Path: "TaskTemplate.ContainerSpec.Image", Old: "web:1", New: "web:2"}
	if len(got[2].Changes) != 1 || got[2].Changes[0] != want {
		t.Errorf("changes %+v, want %+v alone", got[2].Changes, want)
	}
	page := f.revisions(&api.RevisionsRequest{Ref: "web", Before: 4, Limit: 2})
	if len(page) != 2 || page[0].Number != 3 || page[1].Number != 2 || len(page[1].Changes) != 1 {
		t.Errorf("page %+v", page)
	}
	two := f.revisions(&api.RevisionsRequest{Ref: "web", Numbers: []uint64{1, 3}})
	if len(two) != 2 || !strings.Contains(string(two[1].Spec), "web:1") || !strings.Contains(string(two[0].Spec), "web:3") {
		t.Errorf("specs %+v", two)
	}
	if _, err := f.srv.ListRevisions(ctx, &api.RevisionsRequest{Ref: "web", Numbers: []uint64{9}}); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "no revision 9") {
		t.Errorf("got error %v", err)
	}
}

func TestRollbackToRevision(t *testing.T) {
	f := setup(t)
	f.raiseLevel()
	id := f.create(`{"Name":"web","TaskTemplate":{"ContainerSpec":{"Image":"web:1"}}}`)
	version := func() (v uint64) {
		f.st.View(func(tx store.ReadTx) { v = tx.Service(id).Meta.Version })
		return v
	}
	image := func() (s, state string) {
		f.st.View(func(tx store.ReadTx) {
			svc := tx.Service(id)
			s, state = svc.Spec.TaskTemplate.ContainerSpec.Image, svc.UpdateStatus.GetState()
		})
		return s, state
	}
	for i := 2; i < 5; i++ {
		_, err := f.srv.UpdateService(t.Context(), &api.UpdateRequest{Ref: id, Version: version(),
			SpecJson: fmt.Appendf(nil, `{"Name":"web","TaskTemplate":{"ContainerSpec":{"Image":"web:%d"}}}`, i)})
		f.ok(err)
	}
	_, err := f.srv.UpdateService(t.Context(), &api.UpdateRequest{Ref: id, Version: version(), Rollback: "revision", RollbackTo: 2})
	f.ok(err)
	if got, state := image(); got != "web:2" || state != "rollback_started" {
		t.Fatalf("after the rollback: %s, %s", got, state)
	}
	if r := f.revisions(&api.RevisionsRequest{Ref: id, Limit: 1}); r[0].Number != 5 || r[0].Note != "rollback to revision 2" {
		t.Errorf("history %+v", r)
	}
	// As with Swarm, a rollback by hand swaps: the next one returns to what was.
	_, err = f.srv.UpdateService(t.Context(), &api.UpdateRequest{Ref: id, Version: version(), Rollback: "previous"})
	f.ok(err)
	if got, _ := image(); got != "web:4" {
		t.Errorf("after the second rollback: %s", got)
	}
	for _, r := range []*api.UpdateRequest{
		{Ref: id, Version: version(), Rollback: "revision", RollbackTo: 77},
		{Ref: id, Version: version(), Rollback: "revision"},
		{Ref: id, Version: version(), Rollback: "revision", RollbackTo: 4},
		{Ref: id, Version: 1, Rollback: "revision", RollbackTo: 1},
	} {
		before := version()
		if _, err := f.srv.UpdateService(t.Context(), r); err == nil || version() != before {
			t.Errorf("%v: accepted", r)
		}
	}
}

func TestOrchestrationOptions(t *testing.T) {
	f := setup(t)
	for _, labels := range []string{
		`{"skein.drain.parallelism":"3","skein.drain.order":"start-first","skein.node.down-grace":"1m30s","skein.replace.rate":"0","skein.comment":"why"}`,
	} {
		f.create(fmt.Sprintf(`{"Name":"ok","Labels":%s,"TaskTemplate":{"ContainerSpec":{"Image":"web:1"}}}`, labels))
	}
	for label, value := range map[string]string{"skein.drain.parallelism": "-1", "skein.drain.order": "both", "skein.node.down-grace": "5", "skein.replace.rate": "many", "skein.node.orphan-after": "1h", "skein.unknown": "x"} {
		_, err := f.srv.CreateService(t.Context(), &api.CreateRequest{SpecJson: fmt.Appendf(nil, `{"Name":"bad","Labels":{%q:%q},"TaskTemplate":{"ContainerSpec":{"Image":"web:1"}}}`, label, value)})
		if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), fmt.Sprintf("Labels[%q]", label)) {
			t.Errorf("%s=%s: got error %v", label, value, err)
		}
	}
}
