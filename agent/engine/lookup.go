package engine

import (
	"strings"
)

func hasPrefix(s, p string) bool { return strings.HasPrefix(s, p) }

// find resolves a name, an id, or a unique id prefix, in docker's order.
func (e *Engine) find(ref string) (*entry, error) {
	e.mu.RLock()
	defer e.mu.RUnlock()
	if c, ok := e.containers[ref]; ok {
		return c, nil
	}
	if id, ok := e.names[strings.TrimPrefix(ref, "/")]; ok {
		return e.containers[id], nil
	}
	var found *entry
	if ref != "" {
		for id, c := range e.containers {
			if hasPrefix(id, ref) {
				if found != nil {
					return nil, invalid("multiple IDs found with provided prefix: %s", ref)
				}
				found = c
			}
		}
	}
	if found == nil {
		return nil, notFound("No such container: %s", ref)
	}
	return found, nil
}

// acquire finds a container and takes it for one operation; the caller gives c.op back.
func (e *Engine) acquire(ref string) (*entry, error) {
	c, err := e.find(ref)
	if err != nil {
		return nil, err
	}
	if err := c.lock(); err != nil {
		return nil, err
	}
	return c, nil
}

// all returns every container, newest first.
func (e *Engine) all() []*entry {
	e.mu.RLock()
	out := make([]*entry, 0, len(e.containers))
	for _, c := range e.containers {
		out = append(out, c)
	}
	e.mu.RUnlock()
	sortNewest(out)
	return out
}

// register claims the name and makes the container visible.
func (e *Engine) register(c *entry) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if id, ok := e.names[c.rec.Name]; ok {
		return conflict("Conflict. The container name %q is already in use by container %q. You have to remove (or rename) that container to be able to reuse that name.", "/"+c.rec.Name, id)
	}
	e.names[c.rec.Name] = c.rec.ID
	e.containers[c.rec.ID] = c
	if c.rec.Task != "" {
		e.tasks[c.rec.Task] = c
	}
	return nil
}

func (e *Engine) unregister(c *entry) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.containers, c.rec.ID)
	if e.tasks[c.rec.Task] == c {
		delete(e.tasks, c.rec.Task)
	}
	if e.names[c.rec.Name] == c.rec.ID {
		delete(e.names, c.rec.Name)
	}
}

func labelMatches(labels map[string]string, want string) bool {
	k, v, hasValue := strings.Cut(want, "=")
	got, ok := labels[k]
	return ok && (!hasValue || got == v)
}
