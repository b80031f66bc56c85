package placement

import (
	"strconv"

	"skein/manager/store"
	"skein/scheduler"
)

// Labels of a service by which it wishes how its tasks are placed. They are not part of the tasks: changing them replaces none.
const (
	// LabelStrategy is "spread" (the default) or "binpack".
	LabelStrategy = "skein.placement.strategy"
	// LabelPriority is a number; tasks of a higher one are placed first.
	LabelPriority = "skein.priority"
	// MaxPriority bounds priorities, both ways.
	MaxPriority = 1000
)

// ParseStrategy reads the value of LabelStrategy.
func ParseStrategy(text string) (s scheduler.Strategy, ok bool) {
	switch text {
	case "", "spread":
		return scheduler.Spread, true
	case "binpack":
		return scheduler.Binpack, true
	}
	return scheduler.Spread, false
}

// ParsePriority reads the value of LabelPriority.
func ParsePriority(text string) (n int, ok bool) {
	if text == "" {
		return 0, true
	}
	n, err := strconv.Atoi(text)
	return n, err == nil && n >= -MaxPriority && n <= MaxPriority
}

// wishes are a service's; control has refused what cannot be read.
func wishes(svc *store.Service) (scheduler.Strategy, int) {
	if svc == nil {
		return scheduler.Spread, 0
	}
	strategy, _ := ParseStrategy(svc.Spec.Labels[LabelStrategy])
	priority, _ := ParsePriority(svc.Spec.Labels[LabelPriority])
	return strategy, priority
}

// home is the node where a volume of the task's slot lives, and which volume; empty when the task may go anywhere.
func home(view store.ReadTx, t *store.Task) (node, volume string) {
	svc := view.Service(t.ServiceID)
	if svc == nil || t.Slot == 0 {
		return "", ""
	}
	for _, volume := range store.HomeVolumes(svc, t.Revision) {
		if node := view.VolumeHome(t.ServiceID, t.Slot, volume); node != "" {
			return node, volume
		}
	}
	return "", ""
}
