package dispatcher

import (
	"encoding/json"
	"time"

	"skein/manager/store"
)

// LabelDrainTimeout is a label of services and of the cluster: how long the connections of clients to a task that is to stop are waited for.
const LabelDrainTimeout = "skein.drain.timeout"

// drainTimeoutOf is the label as an assignment carries it: nanoseconds; 0: it says nothing, below 0: no wait.
func drainTimeoutOf(labels map[string]string) int64 {
	d, err := time.ParseDuration(labels[LabelDrainTimeout])
	switch {
	case err != nil || d < 0:
		return 0
	case d == 0:
		return -1
	}
	return int64(d)
}

// drainTimeoutFor is what a stopping task's service says now, which its revision may not have said; of a removed service what its
// revision said; otherwise what the cluster says.
func (d *Dispatcher) drainTimeoutFor(tx store.ReadTx, t *store.Task, e *taskEntry) int64 {
	var labels map[string]string
	if svc := tx.Service(t.ServiceID); svc != nil {
		labels = svc.Spec.Labels
	} else if len(e.template.msg.ServiceLabelsJson) > 0 {
		_ = json.Unmarshal(e.template.msg.ServiceLabelsJson, &labels) // we wrote it
	}
	if own := drainTimeoutOf(labels); own != 0 {
		return own
	}
	return d.drainTimeout
}
