package control_test

import (
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"skein/manager/api"
)

func TestJoinTokens(t *testing.T) {
	f := setup(t)
	hour := int64(time.Hour)
	if _, err := f.srv.CreateJoinToken(t.Context(), &api.JoinTokenRequest{Role: "worker", Uses: 1}); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "upgrade all managers") {
		t.Errorf("with managers of an older version: %v", err)
	}
	f.level(api.FeatureLevel)
	for want, r := range map[string]*api.JoinTokenRequest{
		"Role":        {Role: "king", Uses: 1},
		"TTL":         {Role: "worker", TtlNanos: 1},
		"Uses":        {Role: "worker", Uses: 1 << 40},
		"--ttl":       {Role: "worker"},
		"Description": {Role: "worker", Uses: 1, Description: "a\nb"},
	} {
		if _, err := f.srv.CreateJoinToken(t.Context(), r); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %v, want invalid argument that names %s", r, err, want)
		}
	}
	made, err := f.srv.CreateJoinToken(t.Context(), &api.JoinTokenRequest{Role: "worker", TtlNanos: hour, Uses: 5})
	f.ok(err)
	if _, err := api.ParseJoinToken(made.Token); err != nil || made.State != "good" {
		t.Fatalf("made %v: %v", made, err)
	}
	list, err := f.srv.ListJoinTokens(t.Context(), &api.Empty{})
	f.ok(err)
	if len(list.Tokens) != 1 || list.Tokens[0].Token != "" || list.Tokens[0].Id != made.Id || list.Tokens[0].Expires-list.Tokens[0].Created != hour {
		t.Errorf("list: %v", list)
	}
	if _, err := f.srv.RemoveJoinToken(t.Context(), &api.GetRequest{Ref: "nothing"}); !errdefs.IsNotFound(err) {
		t.Errorf("remove what is not there: %v", err)
	}
	if _, err := f.srv.RemoveJoinToken(t.Context(), &api.GetRequest{}); !errdefs.IsNotFound(err) {
		t.Errorf("remove without a name: %v", err)
	}
	_, err = f.srv.RemoveJoinToken(t.Context(), &api.GetRequest{Ref: made.Id[:10]})
	f.ok(err)
	for range 100 { // those that have ended make room
		_, err := f.srv.CreateJoinToken(t.Context(), &api.JoinTokenRequest{Role: "manager", Uses: 1})
		f.ok(err)
	}
	if _, err := f.srv.CreateJoinToken(t.Context(), &api.JoinTokenRequest{Role: "manager", Uses: 1}); !errdefs.IsResourceExhausted(err) {
		t.Errorf("one too many: %v", err)
	}
}
