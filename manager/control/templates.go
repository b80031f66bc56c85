package control

import (
	"fmt"
	"io"
	"strings"
	"text/template"

	"github.com/moby/moby/api/types/swarm"
)

// validateTemplates fills in what swarm allows to be a template with the values of a task that is not there: what fails here would fail on
// every node.
func validateTemplates(c *swarm.ContainerSpec) error {
	check := func(what, text string) error {
		if !strings.Contains(text, "{{") {
			return nil
		}
		t, err := template.New("").Option("missingkey=error").Parse(text)
		if err == nil {
			type m = map[string]any
			err = t.Execute(io.Discard, m{
				"Service": m{"ID": "", "Name": ""},
				"Node":    m{"ID": "", "Hostname": "", "Platform": m{"Architecture": "", "OS": ""}},
				"Task":    m{"ID": "", "Slot": 1, "Name": ""},
			})
		}
		if err != nil {
			return invalid("ContainerSpec: invalid template %q in %s: %s: known are .Service.ID, .Service.Name, .Node.ID, .Node.Hostname, .Node.Platform.Architecture, "+
				".Node.Platform.OS, .Task.ID, .Task.Name and .Task.Slot", text, what, strings.TrimPrefix(err.Error(), "template: "))
		}
		return nil
	}
	if err := check("the hostname", c.Hostname); err != nil {
		return err
	}
	for i, kv := range c.Env {
		if err := check(fmt.Sprintf("Env[%d]", i), kv); err != nil {
			return err
		}
	}
	for _, m := range c.Mounts {
		if err := check("the source of the mount on "+m.Target, m.Source); err != nil {
			return err
		}
	}
	return nil
}
