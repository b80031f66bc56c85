package store

import (
	"bytes"

	"skein/manager/allocator"
	"skein/manager/api"
)

// Every revision of a service is kept as what it had in place of the next one: most changes are a few bytes of a spec. Only size bounds
// them, of one service and of all; the oldest of the service that is being changed go first.
const (
	maxPastOfService = 4 << 20
	maxPast          = 256 << 20
	pastOverhead     = 160 // of one revision in memory
)

func (s *state) level() uint32 { return max(1, s.cluster.GetFeatureLevel()) }

// remember keeps the current revision of a service, which the one with the given spec follows.
func (s *state) remember(old *Service, next []byte) {
	r := old.ServiceRecord.Revisions[len(old.ServiceRecord.Revisions)-1] // the current one is always the last
	p := &api.PastRevision{ServiceId: old.Id, Number: r.Number, Created: r.Created, Author: r.Author, Note: r.Note, RegistryAuth: r.RegistryAuth}
	p.Prefix, p.Suffix = common(r.SpecJson, next)
	p.Middle = bytes.Clone(r.SpecJson[p.Prefix : len(r.SpecJson)-int(p.Suffix)])
	s.putPast(p)
	for s.pastSize[old.Id] > maxPastOfService || s.pastTotal > maxPast {
		first := s.oldestPast(old.Id)
		if first == p {
			return
		}
		s.dropPast(first)
	}
}

func (s *state) oldestPast(service string) *api.PastRevision {
	var found *api.PastRevision
	s.past.from(revKey{service: service}, func(k revKey, r *api.PastRevision) bool {
		if k.service == service {
			found = r
		}
		return false
	})
	return found
}

func (s *state) putPast(r *api.PastRevision) {
	s.past.put(revKey{r.ServiceId, r.Number}, r)
	s.countPast(r.ServiceId, sizeOf(r))
}

func (s *state) dropPast(r *api.PastRevision) {
	s.past.del(revKey{r.ServiceId, r.Number})
	s.countPast(r.ServiceId, -sizeOf(r))
}

// forgetPast drops all revisions of a service that is removed.
func (s *state) forgetPast(service string) {
	for r := s.oldestPast(service); r != nil; r = s.oldestPast(service) {
		s.dropPast(r)
	}
}

func sizeOf(r *api.PastRevision) int {
	return pastOverhead + len(r.Middle) + len(r.Author) + len(r.Note) + len(r.RegistryAuth)
}

func (s *state) countPast(service string, by int) {
	total := s.pastTotal
	s.j.Add(func() { s.pastTotal = total })
	s.pastTotal += by
	if n := s.pastSize[service] + by; n > 0 {
		allocator.Set(s.j, s.pastSize, service, n)
		return
	}
	allocator.Unset(s.j, s.pastSize, service)
}

// Revisions implements ReadTx. The specs before the current one are put together on the way.
func (v view) Revisions(service string, f func(*api.Revision) bool) {
	svc := v.s.services.get(service)
	if svc == nil {
		return
	}
	current := svc.ServiceRecord.Revisions[len(svc.ServiceRecord.Revisions)-1]
	if !f(current) {
		return
	}
	spec := current.SpecJson
	v.s.past.down(revKey{service, current.Number}, func(k revKey, r *api.PastRevision) bool {
		if k.service != service {
			return false
		}
		if int(r.Prefix)+int(r.Suffix) > len(spec) {
			return false // of another spec: a snapshot that was not ours
		}
		older := make([]byte, 0, int(r.Prefix)+len(r.Middle)+int(r.Suffix))
		older = append(append(append(older, spec[:r.Prefix]...), r.Middle...), spec[len(spec)-int(r.Suffix):]...)
		spec = older
		return f(&api.Revision{Number: r.Number, SpecJson: spec, Created: r.Created, Author: r.Author, Note: r.Note, RegistryAuth: r.RegistryAuth})
	})
}

// maxRegistryAuth bounds the credentials of one revision: tokens may be long.
const maxRegistryAuth = 16 << 10

// RegistryAuth is what nodes authenticate with for the image of a revision that is kept, JSON of moby registry.AuthConfig; nil for nothing.
func (v *Service) RegistryAuth(revision uint64) []byte {
	for _, r := range v.ServiceRecord.Revisions {
		if r.Number == revision {
			return r.RegistryAuth
		}
	}
	return nil
}

// credentials are what nodes authenticate with at the registry of a service whose record is written: the given ones, else those of the newest
// revision with the same spec, to which a rollback returns, else those of the current one.
func (s *state) credentials(rec *api.ServiceRecord, old *Service) ([]byte, error) {
	given := rec.RegistryAuth
	switch {
	case s.level() < api.LevelHistory || string(given) == "{}":
		return nil, nil
	case len(given) > maxRegistryAuth:
		return nil, api.Errorf(errInvalid, "service %s: its registry credentials have %d bytes, %d are possible", rec.Name, len(given), maxRegistryAuth)
	case len(given) > 0 || old == nil:
		return given, nil
	}
	var found []byte
	current, same := true, false
	view{s}.Revisions(old.Id, func(r *api.Revision) bool {
		if same = bytes.Equal(r.SpecJson, rec.SpecJson); same || current {
			found = r.RegistryAuth
		}
		current = false
		return !same
	})
	return found, nil
}

// common is the length of what two specs begin with, and of what they end with beside that.
func common(a, b []byte) (prefix, suffix uint32) {
	n := min(len(a), len(b))
	p := 0
	for p < n && a[p] == b[p] {
		p++
	}
	q := 0
	for q < n-p && a[len(a)-1-q] == b[len(b)-1-q] {
		q++
	}
	return uint32(p), uint32(q)
}
