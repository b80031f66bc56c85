package engine

import (
	"strings"

	"skein/manager/api"
)

// expander fills in the templates that swarm allows in hostname, environment and mounts.
type expander struct {
	a        *api.Assignment
	hostname string
	err      error

	// In the content of configs and secrets:
	lookup func(kind, target string) (string, error) // the task's own; nil elsewhere
	env    []string
	secret bool // what is expanded shall not be in errors
}

// funcs are those that swarm's templates of contents know.
func (x *expander) funcs() map[string]func(string) (string, error) {
	if x.lookup == nil {
		return nil
	}
	return map[string]func(string) (string, error){
		"secret": func(target string) (string, error) { return x.lookup("secret", target) },
		"config": func(target string) (string, error) { return x.lookup("config", target) },
		"env": func(name string) (string, error) {
			for _, kv := range x.env {
				if v, ok := strings.CutPrefix(kv, name+"="); ok {
					return v, nil
				}
			}
			return "", nil
		},
	}
}

func (x *expander) expand(s string) string {
	if x.err != nil {
		return s
	}
	slot := any(x.a.Slot)
	if x.a.Slot == 0 {
		slot = x.a.NodeId
	}
	type m = map[string]any
	text, err := api.ExpandTemplate(s, m{
		"Service": m{"ID": x.a.ServiceId, "Name": x.a.ServiceName},
		"Node":    m{"ID": x.a.NodeId, "Hostname": x.hostname, "Platform": m{"Architecture": machine(), "OS": "linux"}},
		"Task":    m{"ID": x.a.TaskId, "Slot": slot, "Name": x.a.ServiceName + "." + toString(slot) + "." + x.a.TaskId},
	}, x.funcs())
	switch {
	case err == nil:
		return text
	case x.secret:
		x.err = invalid("its template cannot be expanded: the error is not shown, as it could hold some of the secret; loops, variables and templates within it are not possible")
	case x.lookup != nil:
		x.err = invalid("its template cannot be expanded: %v", err)
	default:
		x.err = invalid("template %q cannot be expanded: %v", s, err)
	}
	return s
}
