package control

import (
	"cmp"
	"encoding/json"
	"slices"
	"sort"
	"strings"

	"github.com/containerd/errdefs"

	"skein/manager/api"
	"skein/manager/store"
)

// page is one answer to a list request: of the objects behind those that were answered before, as many as fit.
type page struct {
	after string // the place of the last one before
	limit int    // bytes of JSON; 0: all
	out   *api.Objects
	bytes int
	last  string
}

func newPage(after string, limit uint32) *page {
	return &page{after: after, limit: int(limit), out: &api.Objects{}}
}

// full notes that there is more than fits.
func (p *page) full() bool {
	if p.limit == 0 || p.bytes < p.limit {
		return false
	}
	p.out.Next = p.last
	return true
}

func (p *page) add(place string, v any) error {
	b, err := encode(v)
	if err != nil {
		return err
	}
	p.addJSON(place, b)
	return nil
}

func (p *page) addJSON(place string, b []byte) {
	p.out.Json = append(p.out.Json, b)
	p.bytes += len(b)
	p.last = place
}

// behind is the rest of a list that is in order of ids.
func behind[T any](list []T, after string, id func(T) string) []T {
	if after == "" {
		return list
	}
	return list[sort.Search(len(list), func(i int) bool { return id(list[i]) > after }):]
}

// place is where a task is in a list of tasks: they are in the order of services, slots or nodes, and generations, so that a list goes on
// where it was even if the task is gone.
type place struct {
	Service    string
	Slot       uint64
	Node       string
	Generation uint32
}

func placeOf(t store.TaskRef) place {
	p := place{Service: t.ServiceID(), Slot: t.Slot(), Generation: t.Generation()}
	if p.Slot == 0 {
		p.Node = t.NodeID()
	}
	return p
}

func (p place) compare(o place) int {
	return cmp.Or(strings.Compare(p.Service, o.Service), cmp.Compare(p.Slot, o.Slot), strings.Compare(p.Node, o.Node), cmp.Compare(p.Generation, o.Generation))
}

func (p place) String() string {
	b, err := json.Marshal(p)
	if err != nil {
		panic(err) // plain fields
	}
	return string(b)
}

// parsePlace reads what String wrote; empty is before all.
func parsePlace(s string) (p place, err error) {
	if s == "" {
		return p, nil
	}
	if err := json.Unmarshal([]byte(s), &p); err != nil {
		return p, api.Errorf(errdefs.ErrInvalidArgument, "invalid place in a list of tasks %s: want the one that the page before named", shorten(s))
	}
	return p, nil
}

// eachTask calls f for the tasks that the filters can match, in order, from behind a place on, until it returns false.
func (l *lister) eachTask(after place, f func(store.TaskRef) bool) {
	if want := l.f["node"]; len(want) == 1 {
		if n, err := l.tx.FindNode(want[0]); err == nil {
			l.ofNode(n.Id, after, f)
			return
		}
	}
	if want := l.f["service"]; len(want) == 1 {
		id := want[0] // perhaps of a service that was removed
		if svc, err := l.tx.FindService(id); err == nil {
			id = svc.Id
		}
		l.ofService(id, after, f)
		return
	}
	for _, id := range l.services() {
		if id >= after.Service && !l.ofService(id, after, f) {
			return
		}
	}
}

// services are the ids of all services that have tasks, removed ones among them, in order.
func (l *lister) services() []string {
	var ids []string
	for _, s := range l.tx.Services() {
		ids = append(ids, s.Id)
	}
	known, last := len(ids), ""
	l.tx.EachTask(func(t store.TaskRef) bool {
		if id := t.ServiceID(); id != last {
			if _, found := slices.BinarySearch(ids[:known], id); !found && !slices.Contains(ids[known:], id) {
				ids = append(ids, id)
			}
			last = id
		}
		return true
	})
	slices.Sort(ids)
	return ids
}

func (l *lister) ofService(id string, after place, f func(store.TaskRef) bool) (more bool) {
	more = true
	l.tx.EachTaskOfService(id, func(t store.TaskRef) bool {
		if placeOf(t).compare(after) > 0 {
			more = f(t)
		}
		return more
	})
	return more
}

func (l *lister) ofNode(id string, after place, f func(store.TaskRef) bool) {
	var rest []store.TaskRef
	l.tx.EachTaskOfNode(id, func(t store.TaskRef) bool {
		if placeOf(t).compare(after) > 0 {
			rest = append(rest, t)
		}
		return true
	})
	slices.SortFunc(rest, func(a, b store.TaskRef) int { return placeOf(a).compare(placeOf(b)) })
	for _, t := range rest {
		if !f(t) {
			return
		}
	}
}
