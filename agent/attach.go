package agent

import (
	"context"
	"fmt"

	"skein/manager/api"
)

// AwaitNetworks returns when this node's network agrees with tables that have a container which is no task as an endpoint of the networks, and,
// with gateway, has the mesh. At the end of ctx it tells what is missing.
func (a *Agent) AwaitNetworks(ctx context.Context, container string, networks []string, gateway bool) error {
	want := &api.Assignment{TaskId: container}
	for _, id := range networks {
		want.Attachments = append(want.Attachments, &api.Attachment{NetworkId: id})
	}
	if gateway {
		want.Gateway4 = "any"
	}
	if missing := a.tables.await(ctx, want); missing != nil {
		return fmt.Errorf("its network is not ready on this node: %w", missing)
	}
	return nil
}
