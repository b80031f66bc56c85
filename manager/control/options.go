package control

import (
	"maps"
	"slices"
	"strings"
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
	return []option{}
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
