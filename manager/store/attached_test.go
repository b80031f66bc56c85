package store_test

import (
	"testing"

	"github.com/containerd/errdefs"

	"skein/manager/api"
)

// TestDeleteNetworkWithTasks: a network goes while tasks of removed services end on it, and stays while any task on it is wanted; which one is
// named is the same on every manager, restored ones too.
func TestDeleteNetworkWithTasks(t *testing.T) {
	c := newCluster(t)
	c.do(putCluster(&api.ClusterRecord{Id: "c1"}), putNode("n1", "host1"), network("web"), network("other"))
	run := func(service string, slot uint64) string {
		id := api.TaskID(service, slot, "", 1)
		c.do(createTask(service, 1, slot, "", 1), place(id, "n1"))
		return id
	}
	c.do(putService("busy", spec("busy", on("other"))))
	for slot := range uint64(20) {
		run("busy", slot+1)
	}
	var gone, moved []string
	c.do(putService("gone", spec("gone", on("web"))), putService("moved", spec("moved", on("web", "other"))))
	for slot := range uint64(5) {
		gone, moved = append(gone, run("gone", slot+1)), append(moved, run("moved", slot+1))
	}
	c.refused(errdefs.IsFailedPrecondition, []string{"in use by service"}, deleteNetwork("web"))
	c.do(deleteService("gone"), putService("moved", spec("moved", on("other"))))

	least := func(ids ...string) string {
		out := ids[0]
		for _, id := range ids {
			out = min(out, id)
		}
		return out
	}
	c.refused(errdefs.IsFailedPrecondition, []string{"in use by task " + least(moved...)}, deleteNetwork("web"))
	c.sameAfterRestore()
	var ends []*api.Change
	for _, id := range moved {
		ends = append(ends, report(id, "n1", api.TaskShutdown))
	}
	c.do(ends...) // only tasks that end hold addresses
	c.do(deleteNetwork("web"))
	c.sameAfterRestore()
	c.refused(errdefs.IsFailedPrecondition, []string{"still hangs on"}, network("web"))
	ends = nil
	for _, id := range gone {
		ends = append(ends, report(id, "n1", api.TaskShutdown))
	}
	c.do(ends...)
	c.do(network("web"))
	c.do(deleteNetwork("web"))
	c.sameAfterRestore()
}
