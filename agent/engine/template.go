package engine

import (
	"strings"
	"text/template"

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
}

// funcs are those that swarm's templates of contents know.
func (x *expander) funcs() template.FuncMap {
	if x.lookup == nil {
		return nil
	}
	return template.FuncMap{
		"secret": func(target string) (string, error) { return x.lookup("secret", target) },
		"config": func(target string) (string, error) { return x.lookup("config", target) },
		"env": func(name string) string {
			for _, kv := range x.env {
				if v, ok := strings.CutPrefix(kv, name+"="); ok {
					return v
				}
			}
			return ""
		},
	}
}

func (x *expander) expand(s string) string {
	if x.err != nil || !strings.Contains(s, "{{") {
		return s
	}
	t, err := template.New("").Option("missingkey=error").Funcs(x.funcs()).Parse(s)
	var b strings.Builder
	if err == nil {
		slot := any(x.a.Slot)
		if x.a.Slot == 0 {
			slot = x.a.NodeId
		}
		type m = map[string]any
		err = t.Execute(&b, m{
			"Service": m{"ID": x.a.ServiceId, "Name": x.a.ServiceName},
			"Node":    m{"ID": x.a.NodeId, "Hostname": x.hostname, "Platform": m{"Architecture": machine(), "OS": "linux"}},
			"Task":    m{"ID": x.a.TaskId, "Slot": slot, "Name": x.a.ServiceName + "." + toString(slot) + "." + x.a.TaskId},
		})
	}
	if err != nil {
		x.err = invalid("template %q cannot be expanded: %v", s, err)
		return s
	}
	return b.String()
}
