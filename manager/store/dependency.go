package store

import (
	"bytes"
	"slices"
	"strings"

	"github.com/moby/moby/api/types/swarm"

	"skein/manager/allocator"
	"skein/manager/api"
)

// Bounds of contents, docker's.
const (
	MaxSecretBytes = 500 << 10
	MaxConfigBytes = 1000 << 10
)

// depName is a name; secrets and configs have their own.
type depName struct{ kind, name string }

// storeDependency stores a secret or config under its name.
func (s *state) storeDependency(d *Dependency) {
	allocator.Set(s.j, s.depNames, depName{d.Kind, d.Name}, d.Id)
	s.deps.put(d.Id, d)
	s.changedObject(KindDependency, d.Id)
}

// putDependency makes a secret or config, or changes the labels of one: name and content are for ever.
func (s *state) putDependency(d *api.DependencyRecord) error {
	if err := checkID(d.Kind, d.Id); err != nil {
		return err
	}
	if err := checkSize(d.Kind, d.Id, d.SpecJson); err != nil {
		return err
	}
	old := s.deps.get(d.Id)
	holder, taken := s.depNames[depName{d.Kind, d.Name}]
	switch {
	case d.Kind != KindSecret && d.Kind != KindConfig:
		return api.Errorf(errInvalid, "dependency %s is of unknown kind %q", d.Id, d.Kind)
	case old != nil && (old.Kind != d.Kind || old.Name != d.Name || !bytes.Equal(old.Data, d.Data)):
		return api.Errorf(errPrecondition, "%s %s: only labels can change: make a new one and update the services", old.Kind, old.Name)
	case d.Name == "":
		return api.Errorf(errInvalid, "%s %s: name must be provided", d.Kind, d.Id)
	case taken && holder != d.Id:
		return api.Errorf(errExists, "%s %s already exists", d.Kind, d.Name)
	case len(d.Data) > MaxConfigBytes || (d.Kind == KindSecret && len(d.Data) > MaxSecretBytes):
		return api.Errorf(errInvalid, "%s %s: %d bytes are too many", d.Kind, d.Name, len(d.Data))
	}
	d.Meta = nextMeta(old.GetMeta(), s.version, s.time)
	s.storeDependency(d)
	return nil
}

// deleteDependency removes a secret or config that no service refers to.
func (s *state) deleteDependency(r *api.DependencyRef) error {
	d := s.deps.get(r.Id)
	if d.GetKind() != r.Kind || d == nil {
		return api.Errorf(errNotFound, "%s %s not found", r.Kind, r.Id)
	}
	if users := DependencyUsers(view{s}, d.Id); len(users) > 0 {
		return InUse(d, users)
	}
	allocator.Unset(s.j, s.depNames, depName{d.Kind, d.Name})
	s.deps.del(d.Id)
	s.changedObject(KindDependency, d.Id)
	return nil
}

// DependencyUsers names the services whose current spec refers to a secret or config.
func DependencyUsers(tx ReadTx, id string) []string {
	var out []string
	for _, v := range tx.Services() {
		if slices.Contains(DependencyIDs(v.Spec), id) {
			out = append(out, v.Name)
		}
	}
	return out
}

// InUse is the error of removing what services need.
func InUse(d *Dependency, users []string) error {
	s := ""
	if len(users) > 1 {
		s = "s"
	}
	return api.Errorf(errInvalid, "%s '%s' is in use by the following service%s: %s", d.Kind, d.Name, s, strings.Join(users, ", "))
}

// DependencyIDs lists the ids of the secrets and configs that tasks of a spec find as files, each once.
func DependencyIDs(spec *swarm.ServiceSpec) []string {
	c := spec.TaskTemplate.ContainerSpec
	if c == nil {
		return nil
	}
	var out []string
	add := func(id string) {
		if !slices.Contains(out, id) {
			out = append(out, id)
		}
	}
	for _, r := range c.Secrets {
		add(r.SecretID)
	}
	for _, r := range c.Configs {
		add(r.ConfigID)
	}
	return out
}

// checkDependencies refuses a spec that refers to what is not there.
func (s *state) checkDependencies(service string, spec *swarm.ServiceSpec) error {
	c := spec.TaskTemplate.ContainerSpec
	if c == nil {
		return nil
	}
	check := func(kind, id, name string) error {
		if d := s.deps.get(id); d.GetKind() != kind {
			return api.Errorf(errNotFound, "service %s: %s %s not found", service, kind, either(name, id))
		}
		return nil
	}
	for _, r := range c.Secrets {
		if err := check(KindSecret, r.SecretID, r.SecretName); err != nil {
			return err
		}
	}
	for _, r := range c.Configs {
		if err := check(KindConfig, r.ConfigID, r.ConfigName); err != nil {
			return err
		}
	}
	return nil
}
