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
}

func (x *expander) expand(s string) string {
	if x.err != nil || !strings.Contains(s, "{{") {
		return s
	}
	t, err := template.New("").Option("missingkey=error").Parse(s)
	var b strings.Builder
	if err == nil {
		slot := any(x.a.Slot)
		if x.a.Slot == 0 {
			slot = x.a.NodeId
		}
		type m = map[string]any
		err = t.Execute(&b, m{
			"Service": m{"ID": x.a.ServiceId, "Name": x.a.ServiceName},
			"Node":    m{"ID": x.a.NodeId, "Hostname": x.hostname},
			"Task":    m{"ID": x.a.TaskId, "Slot": slot, "Name": x.a.ServiceName + "." + toString(slot) + "." + x.a.TaskId},
		})
	}
	if err != nil {
		x.err = invalid("template %q cannot be expanded: %v", s, err)
		return s
	}
	return b.String()
}
