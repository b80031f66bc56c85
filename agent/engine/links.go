package engine

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/moby/api/types/container"
)

// containerLink is a name that a container on the default bridge has for another.
type containerLink struct {
	ID    string // of the other
	Alias string
}

// parseLink splits "name:alias"; the alias is the name when it is left out. Docker's own way to write it back is "/name:/parent/alias".
func parseLink(s string) (name, alias string, err error) {
	if s == "" {
		return "", "", invalid("empty string specified for links")
	}
	f := strings.Split(s, ":")
	if len(f) > 2 {
		return "", "", invalid("bad format for links: %s", s)
	}
	name, alias = strings.TrimPrefix(f[0], "/"), strings.TrimPrefix(f[len(f)-1], "/")
	if len(f) == 2 && strings.HasPrefix(f[0], "/") {
		alias = alias[strings.LastIndex(alias, "/")+1:]
	}
	if name == "" || alias == "" {
		return "", "", invalid("bad format for links: %s", s)
	}
	return name, alias, nil
}

// links checks the links of a new container.
func (e *Engine) links(hc *container.HostConfig) ([]containerLink, error) {
	if hc.NetworkMode.IsUserDefined() || len(hc.Links) == 0 {
		return nil, nil // there they are the endpoint's
	}
	if hc.NetworkMode.IsHost() || hc.NetworkMode.IsContainer() || hc.NetworkMode.IsNone() {
		return nil, invalid("conflicting options: %s type networking can't be used with links. This would result in undefined behavior", hc.NetworkMode.NetworkName())
	}
	var out []containerLink
	for _, s := range hc.Links {
		name, alias, err := parseLink(s)
		if err != nil {
			return nil, err
		}
		c, err := e.find(name)
		if err != nil {
			return nil, invalid("could not get container for %s: No such container: %s", name, name) // see endpointSettings
		}
		if c.snapshot().HostConfig.NetworkMode.IsHost() {
			return nil, invalid("conflicting options: host type networking can't be used with links. This would result in undefined behavior")
		}
		out = append(out, containerLink{c.snapshot().ID, alias})
	}
	return out, nil
}

// linked lists the containers that r links to and that are still there.
func (e *Engine) linked(r record) map[containerLink]record {
	out := map[containerLink]record{}
	for _, l := range r.Links {
		if c := e.byID(l.ID); c != nil {
			out[l] = c.snapshot()
		}
	}
	return out
}

// checkLinked refuses to start a container whose links lead nowhere.
func (e *Engine) checkLinked(r record) error {
	for l, o := range e.linked(r) {
		if !o.State.active() {
			return conflict("Cannot link to a non running container: /%s AS /%s/%s", o.Name, r.Name, l.Alias)
		}
	}
	return nil
}

// linkLines are the lines of a container's hosts file for those that it links to.
func (e *Engine) linkLines(r record) string {
	var b strings.Builder
	linked := e.linked(r)
	for _, l := range r.Links {
		o, ok := linked[l]
		if !ok {
			continue
		}
		names := []string{l.Alias, o.Config.Hostname}
		if l.Alias != o.Name {
			names = append(names, o.Name)
		}
		for _, leg := range o.Sandbox.Bridges {
			if n, err := e.nets.find(leg.BridgeID); err != nil || n.Name != defaultBridge {
				continue
			}
			if leg.Addr4.IsValid() {
				fmt.Fprintf(&b, "%s\t%s\n", leg.Addr4.Addr(), strings.Join(names, " "))
			}
			if leg.Addr6.IsValid() {
				fmt.Fprintf(&b, "%s\t%s\n", leg.Addr6.Addr(), strings.Join(names, " "))
			}
		}
	}
	return b.String()
}

// linksOf writes a container's links as docker shows them.
func (e *Engine) linksOf(r record) []string {
	var out []string
	linked := e.linked(r)
	for _, l := range r.Links {
		if o, ok := linked[l]; ok {
			out = append(out, fmt.Sprintf("/%s:/%s/%s", o.Name, r.Name, l.Alias))
		}
	}
	return out
}

// linkNames are the names that others have for containers, "/other/alias", by the container's id.
func (e *Engine) linkNames() map[string][]string {
	out := map[string][]string{}
	for _, c := range e.all() {
		r := c.snapshot()
		for _, l := range r.Links {
			out[l.ID] = append(out[l.ID], "/"+r.Name+"/"+l.Alias)
		}
	}
	for _, names := range out {
		slices.Sort(names)
	}
	return out
}

// tellLinking lets the running containers that link to one know its new address.
func (e *Engine) tellLinking(id string) {
	for _, c := range e.all() {
		r := c.snapshot()
		if !r.State.active() || !slices.ContainsFunc(r.Links, func(l containerLink) bool { return l.ID == id }) {
			continue
		}
		if err := e.refreshLinks(c); err != nil {
			e.log.Error("tell a container the new address of one that it links to", "container", r.Name, "err", err)
		}
	}
}

// refreshLinks rewrites the lines of a running container's hosts file that name those that it links to; the others may be its own.
func (e *Engine) refreshLinks(c *entry) error {
	r := c.snapshot()
	path := filepath.Join(e.containerDir(r.ID), "hosts")
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	lines := strings.Split(string(b), "\n")
	changed := false
	for _, want := range strings.Split(e.linkLines(r), "\n") {
		addr, names, ok := strings.Cut(want, "\t")
		for i, have := range lines {
			old, same, is := strings.Cut(have, "\t")
			if ok && is && same == names && strings.Contains(old, ":") == strings.Contains(addr, ":") && old != addr {
				lines[i], changed = want, true
			}
		}
	}
	if !changed {
		return nil
	}
	return e.writeNetworkFile(r, "hosts", []byte(strings.Join(lines, "\n")))
}
