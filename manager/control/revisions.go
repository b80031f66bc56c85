package control

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/swarm"
	"google.golang.org/protobuf/proto"

	"skein/manager/api"
	"skein/manager/authz"
	"skein/manager/store"
)

const (
	// maxRevisions bounds the revisions of one answer; ask for those before the last of them.
	maxRevisions = 1000
	// maxRevisionBytes bounds what their specs may hold.
	maxRevisionBytes = 16 << 20
	// optionComment is the label that says why a service was changed. It is part of the spec: stock clients can set it.
	optionComment = "skein.comment"
)

// Revision is what a service's spec was from a time on.
type Revision struct {
	Number    uint64
	CreatedAt time.Time
	Author    string           `json:",omitempty"` // the node whose API was used, or "skein" for what managers did by themselves
	Comment   string           `json:",omitempty"` // the label skein.comment, where it is not that of the revision before
	Note      string           `json:",omitempty"` // what the managers say of it
	Current   bool             `json:",omitempty"`
	Changes   []RevisionChange `json:",omitempty"` // against the revision before, as far as that is kept
	Spec      json.RawMessage  `json:",omitempty"` // where it was asked for
}

// RevisionChange is one field of a spec that changed. Old or New is empty where there was, or is, none.
type RevisionChange struct {
	Path string
	Old  string `json:",omitempty"`
	New  string `json:",omitempty"`
}

// author names who makes a request.
func author(ctx context.Context) string {
	c, ok := authz.CallerFrom(ctx)
	if !ok || c.NodeID == "" {
		return ""
	}
	return "node " + c.NodeID
}

// ListRevisions shows what a service was, the newest first.
func (s *Server) ListRevisions(ctx context.Context, r *api.RevisionsRequest) (*api.Objects, error) {
	limit := int(min(r.Limit, maxRevisions))
	if limit == 0 {
		limit = maxRevisions
	}
	if len(r.Numbers) > limit {
		return nil, invalid("%d revisions are asked for at once: the limit is %d", len(r.Numbers), limit)
	}
	var found []*api.Revision // one more than is shown: the last one's changes are against it
	var current uint64
	err := s.read(ctx, func(tx store.ReadTx) error {
		svc, err := tx.FindService(r.Ref)
		if err != nil {
			return err
		}
		current = svc.Revision
		found = pick(tx, svc, r, limit)
		for _, n := range r.Numbers {
			if !slices.ContainsFunc(found, func(f *api.Revision) bool { return f.Number == n }) {
				return noRevision(svc, n)
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	out := newPage("", 0)
	for i, rev := range found {
		if !asked(r, rev.Number) || (i == len(found)-1 && len(found) > limit) {
			continue
		}
		var before *api.Revision
		if i+1 < len(found) && found[i+1].Number < rev.Number {
			before = found[i+1]
		}
		one := revisionObject(rev, before)
		one.Current = rev.Number == current
		if len(r.Numbers) > 0 {
			one.Spec = rev.SpecJson
		}
		if err := out.add("", one); err != nil {
			return nil, err
		}
	}
	return out.out, nil
}

// pick takes the revisions a request is about, and after each the one before it.
func pick(tx store.ReadTx, svc *store.Service, r *api.RevisionsRequest, limit int) (found []*api.Revision) {
	size, wanted := 0, false
	tx.Revisions(svc.Id, func(rev *api.Revision) bool {
		if r.Before != 0 && rev.Number >= r.Before {
			return true
		}
		is := asked(r, rev.Number)
		if is || wanted {
			found = append(found, rev)
			size += len(rev.SpecJson)
		}
		wanted = is
		return len(found) <= limit && size <= maxRevisionBytes
	})
	return found
}

func asked(r *api.RevisionsRequest, number uint64) bool {
	return len(r.Numbers) == 0 || slices.Contains(r.Numbers, number)
}

func noRevision(svc *store.Service, n uint64) error {
	return api.Errorf(errdefs.ErrNotFound, "service %s has no revision %d: the newest is %d, and the oldest ones go when the history of the service gets too large", svc.Name, n, svc.Revision)
}

func revisionObject(rev, before *api.Revision) Revision {
	out := Revision{Number: rev.Number, CreatedAt: time.Unix(0, rev.Created).UTC(), Author: rev.Author, Note: rev.Note}
	var spec, old swarm.ServiceSpec
	_ = json.Unmarshal(rev.SpecJson, &spec) // the store has decoded it before
	if before != nil {
		_ = json.Unmarshal(before.SpecJson, &old)
		out.Changes = changes(before.SpecJson, rev.SpecJson)
	}
	if c := spec.Labels[optionComment]; c != old.Labels[optionComment] {
		out.Comment = c
	}
	return out
}

// changes compares two JSON values field by field.
func changes(before, after []byte) []RevisionChange {
	a, b := map[string]string{}, map[string]string{}
	flatten(before, a)
	flatten(after, b)
	paths := slices.Collect(maps.Keys(a))
	for p := range b {
		if _, both := a[p]; !both {
			paths = append(paths, p)
		}
	}
	slices.Sort(paths)
	var out []RevisionChange
	for _, p := range paths {
		if a[p] != b[p] {
			out = append(out, RevisionChange{Path: p, Old: a[p], New: b[p]})
		}
	}
	return out
}

func flatten(text []byte, into map[string]string) {
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	var v any
	if d.Decode(&v) == nil {
		flattenValue("", v, into)
	}
}

func flattenValue(path string, v any, into map[string]string) {
	switch v := v.(type) {
	case map[string]any:
		for k, x := range v {
			if path != "" {
				k = path + "." + k
			}
			flattenValue(k, x, into)
		}
	case []any:
		for i, x := range v {
			flattenValue(path+"["+strconv.Itoa(i)+"]", x, into)
		}
	case nil:
	default:
		into[path] = fmt.Sprint(v)
	}
}

// rolledBack is the record with the spec of a revision again, 0 for the one before the current.
func (s *Server) rolledBack(tx store.ReadTx, old *store.Service, to uint64) (*api.ServiceRecord, error) {
	rec := proto.Clone(old.ServiceRecord).(*api.ServiceRecord)
	which, note := "previous spec", ""
	switch {
	case to != 0:
		var found *api.Revision
		tx.Revisions(old.Id, func(r *api.Revision) bool {
			if r.Number == to {
				found = r
			}
			return r.Number > to
		})
		if found == nil {
			return nil, noRevision(old, to)
		}
		rec.SpecJson, which = found.SpecJson, fmt.Sprintf("revision %d", to)
		note = "rollback to " + which
	case old.Previous == nil:
		return nil, api.Errorf(errdefs.ErrFailedPrecondition, "service %s does not have a previous spec", old.Name)
	default:
		rec.SpecJson = old.PreviousSpecJson
		note = fmt.Sprintf("rollback to revision %d", old.ServiceRecord.Previous)
	}
	var spec swarm.ServiceSpec
	if err := json.Unmarshal(rec.SpecJson, &spec); err != nil {
		return nil, api.Errorf(errdefs.ErrDataLoss, "service %s: its %s cannot be read: %v", old.Name, which, err)
	}
	if bytes.Equal(rec.SpecJson, old.SpecJson) {
		return nil, api.Errorf(errdefs.ErrFailedPrecondition, "service %s: its %s is the same as its current one", old.Name, which)
	}
	for _, id := range store.DependencyIDs(&spec) {
		if tx.Dependency(id) == nil {
			return nil, api.Errorf(errdefs.ErrFailedPrecondition, "service %s cannot be rolled back: a secret or config of its %s (%s) is not there any more: update the service instead",
				old.Name, which, id)
		}
	}
	for _, n := range spec.TaskTemplate.Networks {
		if _, err := networkID(tx, n.Target); err != nil {
			return nil, api.Errorf(errdefs.ErrFailedPrecondition, "service %s cannot be rolled back: network %s of its %s is not there any more: update the service instead",
				old.Name, n.Target, which)
		}
	}
	rec.ForceUpdate, rec.Note = spec.TaskTemplate.ForceUpdate, note
	if !old.Job() {
		rec.UpdateStatus = &api.UpdateStatus{
			ServiceId: old.Id, State: string(swarm.UpdateStateRollbackStarted), Started: s.cfg.Now().UnixNano(), Message: "manually requested rollback",
		}
	}
	return rec, nil
}
