package dockerapi_test

import (
	"context"
	"strings"
	"testing"

	"github.com/moby/moby/api/types/volume"

	"skein/agent/dockerapi"
	"skein/agent/dockerapi/dockerapitest"
)

type someVolumes struct{ dockerapi.Volumes }

func (someVolumes) VolumesUsage(context.Context) ([]volume.Volume, error) {
	return []volume.Volume{
		{Name: "used", UsageData: &volume.UsageData{RefCount: 1, Size: 10}},
		{Name: "idle", UsageData: &volume.UsageData{Size: 5}},
		{Name: "unknown", UsageData: &volume.UsageData{RefCount: -1, Size: -1}},
	}, nil
}

func TestVolumesUsage(t *testing.T) {
	n, c := dockerapitest.NewNode(), dockerapitest.NewCluster()
	h := dockerapi.New(dockerapi.Config{Containers: n, Images: n, Networks: n, System: n, Swarm: c, Volumes: someVolumes{}})
	got := strings.TrimSpace(do(h, "GET", "/v1.55/system/df?type=volume", "").Body.String())
	if want := `{"VolumeUsage":{"ActiveCount":1,"Reclaimable":5,"TotalCount":3,"TotalSize":15}}`; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if got := do(h, "GET", "/v1.50/system/df?type=volume", "").Body.String(); !strings.Contains(got, `"UsageData":{"RefCount":1,"Size":10}`) {
		t.Errorf("old clients: %s", got)
	}
}
