package control

import (
	"strings"

	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
)

// validateTemplates fills in what swarm allows to be a template with the values of a task that is not there: what fails here would fail on
// every node.
func validateTemplates(a at, c *swarm.ContainerSpec) error {
	check := func(a at, text string) error {
		type m = map[string]any
		_, err := api.ExpandTemplate(text, m{
			"Service": m{"ID": "", "Name": ""},
			"Node":    m{"ID": "", "Hostname": "", "Platform": m{"Architecture": "", "OS": ""}},
			"Task":    m{"ID": "", "Slot": 1, "Name": ""},
		}, nil)
		if err != nil {
			return a.bad(text, "invalid template: %s: known are .Service.ID, .Service.Name, .Node.ID, .Node.Hostname, .Node.Platform.Architecture, "+
				".Node.Platform.OS, .Task.ID, .Task.Name and .Task.Slot", strings.TrimPrefix(err.Error(), "template: "))
		}
		return nil
	}
	if err := check(a.field("Hostname"), c.Hostname); err != nil {
		return err
	}
	for i, kv := range c.Env {
		if err := check(a.field("Env").index(i), kv); err != nil {
			return err
		}
	}
	for i, m := range c.Mounts {
		if err := check(a.field("Mounts").index(i).field("Source"), m.Source); err != nil {
			return err
		}
	}
	return nil
}
