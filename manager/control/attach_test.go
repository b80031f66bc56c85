package control_test

import (
	"encoding/json"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/network"

	"skein/manager/api"
	"skein/manager/store"
)

func (f *fixture) attachments(node string) (ids []string) {
	f.st.View(func(tx store.ReadTx) {
		for _, a := range tx.AttachmentsOfNode(node) {
			ids = append(ids, a.Id)
		}
	})
	return ids
}

// TestAttach: a node sets the places of its containers; a full set takes back what it does not name, and what cannot be met spoils nothing.
func TestAttach(t *testing.T) {
	f := setup(t)
	f.level(api.FeatureLevel)
	net := f.network(`{"Name":"web","Driver":"overlay","Attachable":true}`)
	closed := f.network(`{"Name":"closed","Driver":"overlay"}`)
	worker := f.node[1]
	wish := func(id, net string) *api.AttachmentWish {
		return &api.AttachmentWish{Id: id, NodeId: worker, Name: id, Active: true, Gateway: true, Networks: []*api.AttachedNetwork{{NetworkId: net, Names: []string{id}}}}
	}
	attach := func(r *api.AttachRequest) (*api.AttachReply, error) {
		r.NodeId = worker
		return f.srv.Attach(t.Context(), r)
	}
	got, err := attach(&api.AttachRequest{Set: []*api.AttachmentWish{wish("k1", net), wish("k2", net)}})
	f.ok(err)
	if len(got.Attachments) != 2 || got.Attachments[0].Id != "k1" || got.Attachments[0].Networks[0].Addr4 == "" {
		t.Errorf("got %v", got)
	}
	if _, err := attach(&api.AttachRequest{Set: []*api.AttachmentWish{wish("k3", net), wish("k4", closed)}}); !errdefs.IsPermissionDenied(err) {
		t.Errorf("a network that is not attachable: %v", err)
	}
	other := wish("k5", net)
	other.NodeId = f.node[0]
	if _, err := attach(&api.AttachRequest{Set: []*api.AttachmentWish{other}}); !errdefs.IsPermissionDenied(err) {
		t.Errorf("for another node: %v", err)
	}
	got, err = attach(&api.AttachRequest{Full: true, Set: []*api.AttachmentWish{wish("k2", net), wish("k3", closed), wish("k4", net)}})
	f.ok(err)
	if len(got.Attachments) != 2 || got.Attachments[0].Id != "k2" || got.Attachments[1].Id != "k4" {
		t.Errorf("the full set: %v", got)
	}
	if ids := f.attachments(worker); len(ids) != 2 || ids[0] != "k2" || ids[1] != "k4" {
		t.Errorf("left: %v", ids)
	}
	_, err = attach(&api.AttachRequest{Removed: []string{"k2", "none"}})
	f.ok(err)
	if ids := f.attachments(worker); len(ids) != 1 {
		t.Errorf("after a removal: %v", ids)
	}
	if _, err := f.srv.RemoveNetwork(t.Context(), &api.RemoveRequest{Ref: "web"}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("removed a network in use: %v", err)
	}
}

// TestListNodeNetworks: a node sees networks that it may attach to, and those that something on it is on.
func TestListNodeNetworks(t *testing.T) {
	f := setup(t)
	f.level(api.FeatureLevel)
	f.network(`{"Name":"open","Driver":"overlay","Attachable":true}`)
	f.network(`{"Name":"hidden","Driver":"overlay"}`)
	f.network(`{"Name":"used","Driver":"overlay"}`)
	svc := f.create(`{"Name":"web","TaskTemplate":{"ContainerSpec":{"Image":"x"},"Networks":[{"Target":"used"}]}}`)
	f.put(&api.Change{Kind: &api.Change_CreateTasks{CreateTasks: &api.TaskCreate{ServiceId: svc, Revision: 1, Items: []*api.TaskCreate_Item{{Slot: 1, Generation: 1}}}}})
	f.put(&api.Change{Kind: &api.Change_PlaceTasks{PlaceTasks: &api.TaskPlacement{TaskIds: []string{api.TaskID(svc, 1, "", 1)}, NodeIds: []string{f.node[1]}}}})
	for i, want := range []map[string]bool{{"open": true, "ingress": true}, {"open": true, "ingress": true, "used": true}} {
		r, err := f.srv.ListNodeNetworks(t.Context(), &api.NodeNetworksRequest{NodeId: f.node[i]})
		f.ok(err)
		for _, b := range r.Json {
			var n network.Inspect
			f.ok(json.Unmarshal(b, &n))
			if !want[n.Name] {
				t.Errorf("node %d sees network %s", i, n.Name)
			}
			delete(want, n.Name)
		}
		if len(want) > 0 {
			t.Errorf("node %d does not see %v", i, want)
		}
	}
}
