package control

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"skein/manager/dispatcher"
	"skein/manager/orchestrator"
	"skein/manager/placement"
	"skein/manager/store"
)

// optionPrefix is what labels begin with that are Skein's own options of an object: docker's command line can set them like any label.
const optionPrefix = "skein."

// The kinds of objects that options belong to.
const (
	onService = "service"
	onNode    = "node"
	onNetwork = "network"
	onCluster = "cluster"
	onSecret  = "secret"
	onConfig  = "config"
)

// option is one label that means something to Skein. README.md documents them.
type option struct {
	name  string
	on    string // the kind of object
	want  string // its values, as an error tells them
	valid func(value string) bool
}

// options is the table of all of them.
func options() []option {
	duration := func(v string) bool {
		d, err := time.ParseDuration(v)
		return err == nil && d >= 0
	}
	count := func(v string) bool {
		n, err := strconv.Atoi(v)
		return err == nil && n >= 0
	}
	const durations, counts = "a duration such as 30s or 2h, not negative", "a whole number, 0 for no limit"
	const rebalances = "on, join or off"
	var all []option
	for _, on := range []string{onService, onNode, onCluster} {
		all = append(all,
			option{orchestrator.LabelDrainParallelism, on, counts, count},
			option{orchestrator.LabelDownGrace, on, durations, duration})
	}
	return append(all,
		option{orchestrator.LabelDrainOrder, onService, "stop-first or start-first", func(v string) bool { return v == "stop-first" || v == "start-first" }},
		option{orchestrator.LabelReplaceRate, onService, counts, count},
		option{orchestrator.LabelReplaceRate, onCluster, counts, count},
		option{orchestrator.LabelOrphanAfter, onNode, durations, duration},
		option{orchestrator.LabelOrphanAfter, onCluster, durations, duration},
		option{placement.LabelStrategy, onService, "spread or binpack", func(v string) bool { _, ok := placement.ParseStrategy(v); return ok && v != "" }},
		option{placement.LabelPriority, onService, fmt.Sprintf("a whole number, %d to %d", -placement.MaxPriority, placement.MaxPriority),
			func(v string) bool { _, ok := placement.ParsePriority(v); return ok && v != "" }},
		option{store.LabelVolumeHome, onService, "on or off", func(v string) bool { return v == "on" || v == "off" }},
		option{placement.LabelRebalance, onService, rebalances, placement.ValidRebalance},
		option{placement.LabelRebalance, onCluster, rebalances, placement.ValidRebalance},
		option{dispatcher.LabelDrainTimeout, onService, durations, duration},
		option{dispatcher.LabelDrainTimeout, onCluster, durations, duration},
		option{dispatcher.LabelDownShare, onCluster, "a whole number of percent from 0 to 100, 100 for no limit", func(v string) bool {
			n, err := strconv.Atoi(v)
			return err == nil && n >= 0 && n <= 100
		}},
		option{dispatcher.LabelDownHold, onCluster, "a duration such as 30s or 2h, above zero", func(v string) bool { return duration(v) && v != "0" && v != "0s" }},
		option{optionGrow, onNetwork, "on or off", func(v string) bool { return v == "on" || v == "off" }},
		option{optionOverlap, onNetwork, "allow", func(v string) bool { return v == "allow" }},
		option{optionComment, onService, "at most 1024 bytes of text", func(v string) bool { return len(v) <= 1024 }},
	)
}

// validateOptions checks an object's labels, Skein's options among them: one that is not known, or has another value than it can have, is
// refused, for it would do nothing.
func validateOptions(a at, kind string, labels map[string]string) error {
	if err := validateLabels(a, labels); err != nil {
		return err
	}
	known := options()
	for _, k := range sortedKeys(labels) {
		if !strings.HasPrefix(k, optionPrefix) {
			continue
		}
		i := slices.IndexFunc(known, func(o option) bool { return o.name == k && o.on == kind })
		if i < 0 {
			return a.key(k).bad(labels[k], "unknown option: labels that begin with %q are Skein's own; known for a %s: %s", optionPrefix, kind, optionNames(known, kind))
		}
		if !known[i].valid(labels[k]) {
			return a.key(k).bad(labels[k], "want %s", known[i].want)
		}
	}
	return nil
}

func optionNames(known []option, kind string) string {
	var names []string
	for _, o := range known {
		if o.on == kind {
			names = append(names, o.name)
		}
	}
	if len(names) == 0 {
		return "none"
	}
	return strings.Join(names, ", ")
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
