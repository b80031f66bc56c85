package link

import (
	"bytes"
	"fmt"
	"os"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// maxFindings bounds what an audit keeps; the rest is counted.
const maxFindings = 1000

// Audit compares writes with the kernel before they are done. While a Conn, an NS or an nft.Syncer is watched by one, whatever it is told
// to write is looked up first, and what the kernel has not, or has otherwise, becomes a finding. So any code that writes a desired state
// also compares it, whatever kinds of objects it knows. A dry audit keeps the writes from being done: reads then see the kernel as it
// is, and code that waits for its own writes fails, which follows from a finding. Safe for concurrent use.
type Audit struct {
	dry bool

	mu       sync.Mutex
	table    string
	findings []Finding
	more     int
}

// Finding is one difference between the record and the kernel.
type Finding struct {
	Table  string // what it belongs to, see Enter
	Kind   string // "route", "device", "address", "nft element", …
	Object string
	State  string // "missing", "surplus", or in what it differs
	Err    string // why it could not be mended
}

func (f Finding) String() string {
	s := fmt.Sprintf("%s: %s %s: %s", f.Table, f.Kind, f.Object, f.State)
	if f.Err != "" {
		s += " (not mended: " + f.Err + ")"
	}
	return s
}

// NewAudit returns one that lets writes be done, or with dry one that does not.
func NewAudit(dry bool) *Audit { return &Audit{dry: dry} }

// Dry tells that nothing may be written.
func (a *Audit) Dry() bool { return a.dry }

// Enter names what the next findings belong to.
func (a *Audit) Enter(table string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.table = table
}

// Add notes a difference.
func (a *Audit) Add(kind, object, state string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.findings) >= maxFindings {
		a.more++
		return
	}
	f := Finding{Table: a.table, Kind: kind, Object: object, State: state}
	if n := len(a.findings); n > 0 && a.findings[n-1].Table == f.Table && a.findings[n-1].Kind == kind && a.findings[n-1].Object == object {
		return // said twice, by different ways to write it
	}
	a.findings = append(a.findings, f)
}

// Count is the number of findings so far.
func (a *Audit) Count() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.findings) + a.more
}

// Failed notes why findings from the first-th on were not mended.
func (a *Audit) Failed(first int, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for i := first; i < len(a.findings); i++ {
		a.findings[i].Err = err.Error()
	}
}

// Findings returns all of them, and how many more there were than are kept.
func (a *Audit) Findings() (list []Finding, more int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return append([]Finding(nil), a.findings...), a.more
}

// watch is an audit with what it read of one namespace.
type watch struct {
	audit   *Audit
	objects map[string]map[string][]object // dumps by what was asked for, by key
	deleted map[string]bool                // devices that would be deleted, or were
}

// Watch has an audit look at the connection's writes, until Watch(nil). Whoever writes meanwhile is watched: use it under a lock.
func (c *Conn) Watch(a *Audit) {
	if a == nil {
		c.watch.Store(nil)
		return
	}
	c.watch.Store(&watch{audit: a, objects: map[string]map[string][]object{}, deleted: map[string]bool{}})
}

// Do sends requests like Socket.Do. Under an audit only those are sent that change something, and none if it is dry.
func (c *Conn) Do(msgs []Message, ignore ...unix.Errno) error {
	w := c.watch.Load()
	if w == nil {
		return c.Socket.Do(msgs, ignore...)
	}
	first := w.audit.Count()
	var send []Message
	for _, m := range msgs {
		changes, err := w.compare(c, m)
		if err != nil {
			return fmt.Errorf("compare with the kernel: %w", err)
		}
		if changes {
			send = append(send, m)
		}
	}
	if w.audit.dry || len(send) == 0 {
		return nil
	}
	clear(w.objects)
	err := c.Socket.Do(send, ignore...)
	if err != nil {
		w.audit.Failed(first, err)
	}
	return err
}

// object is one answer of a dump.
type object struct {
	body  []byte
	attrs map[uint16][]byte
}

func newObject(body []byte, header int) object {
	o := object{body: bytes.Clone(body), attrs: map[uint16][]byte{}}
	if len(o.body) < header {
		o.body = append(o.body, make([]byte, header-len(o.body))...)
	}
	for t, v := range Parse(o.body[header:]) {
		o.attrs[t] = v
	}
	return o
}

// class is a kind of object: how to list all of them and what makes two the same.
type class struct {
	kind   string
	header int
	typ    uint16 // of the listed objects
	// list is the request for all objects like o.
	list func(o object) Message
	// key is equal for the requested object and the listed one.
	key func(o object) string
	// same compares what is in the headers.
	same func(want, have object) bool
	// inKey are attributes that the key has looked at, or that no list shows.
	inKey map[uint16]bool
	// name is for people.
	name func(w *watch, c *Conn, o object) string
}

// compare tells whether a request changes something, and notes what.
func (w *watch) compare(c *Conn, m Message) (changes bool, err error) {
	if m.Type == unix.RTM_NEWLINK || m.Type == unix.RTM_SETLINK || m.Type == unix.RTM_DELLINK {
		return w.compareLink(c, m)
	}
	cl, remove := classOf(m)
	if cl == nil {
		return true, nil // of a kind that is not known here: written, and no finding
	}
	want := newObject(m.Body, cl.header)
	have, err := w.list(c, cl, want)
	if err != nil {
		return false, err
	}
	state := "missing"
	if remove {
		state = "surplus"
	}
	matches := false
	for _, h := range have {
		if cl.same(want, h) && want.within(h, cl.inKey) {
			matches = true
		} else if !remove {
			state = "differs: is " + cl.name(w, c, h)
		}
	}
	if matches != remove {
		return false, nil
	}
	w.audit.Add(cl.kind, cl.name(w, c, want), state)
	return true, nil
}

// within tells that all attributes of o are equal in h.
func (o object) within(h object, skip map[uint16]bool) bool {
	for t, v := range o.attrs {
		is, there := h.attrs[t]
		if !skip[t] && !(there && sameAttr(v, is)) {
			return false
		}
	}
	return true
}

// sameAttr compares an attribute; one that is a list may have more in the kernel than was asked for.
func sameAttr(want, have []byte) bool {
	if bytes.Equal(want, have) || bytes.Equal(bytes.TrimRight(want, "\x00"), bytes.TrimRight(have, "\x00")) && len(want) != len(have) {
		return true // a string is listed with its end
	}
	inner, wanted := object{}, object{}
	var ok, okToo bool
	if wanted.attrs, ok = nested(want); ok {
		inner.attrs, okToo = nested(have)
	}
	return ok && okToo && wanted.within(inner, nil)
}

// nested reads a value as a list of attributes, if it can be one.
func nested(b []byte) (map[uint16][]byte, bool) {
	out := map[uint16][]byte{}
	n := 0
	for t, v := range Parse(b) {
		out[t] = v
		n += unix.SizeofNlAttr + align(len(v))
	}
	return out, n > unix.SizeofNlAttr && n == align(len(b))
}

// list returns the listed objects with the key of want. Lists are kept until something is written.
func (w *watch) list(c *Conn, cl *class, want object) ([]object, error) {
	req := cl.list(want)
	ask := fmt.Sprintf("%d %x", req.Type, req.Body)
	known := w.objects[ask]
	if known == nil {
		known = map[string][]object{}
		err := c.Dump(req, func(t uint16, b []byte) error {
			if t == cl.typ && len(b) >= cl.header {
				o := newObject(b, cl.header)
				k := cl.key(o)
				known[k] = append(known[k], o)
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
		w.objects[ask] = known
	}
	return known[cl.key(want)], nil
}

// Watch has an audit look at the kernel parameters that are set, until Watch(nil).
func (n *NS) Watch(a *Audit) { n.watch.Store(a) }

// auditSysctl drops the parameters that are as they should be, and all if nothing may be written. It runs inside the namespace.
func auditSysctl(a *Audit, kv map[string]string) (change map[string]string) {
	change = map[string]string{}
	for k, v := range kv {
		path := strings.TrimSuffix(k, "?")
		b, err := os.ReadFile("/proc/sys/net/" + path)
		if err != nil {
			if os.IsNotExist(err) && path != k {
				continue
			}
			if a.dry && os.IsNotExist(err) {
				a.Add("sysctl", "net/"+path, "missing")
				continue
			}
			change[k] = v // which tells the error
			continue
		}
		if is := string(bytes.TrimSpace(b)); is != v {
			a.Add("sysctl", "net/"+path, fmt.Sprintf("differs: is %s, want %s", is, v))
			change[k] = v
		}
	}
	if a.dry {
		return nil
	}
	return change
}
