package overlay

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"syscall"

	"skein/overlay/link"
)

// Comparing means to apply the record once more while an audit watches every write (link.Audit): what would be written is a difference. So
// all that Set, SetBridges and AddSandbox write is compared, whatever it is, and nothing has to be told to the comparison but the few
// things that are made by no write: namespaces and sockets.

// boxesPerStep bounds how many containers are compared before others may have their turn.
const boxesPerStep = 128

// Report is what a comparison found.
type Report struct {
	Findings []link.Finding
	More     int // findings beyond those listed
}

// Check compares everything with the kernel and mends what differs. Before the first Set it leaves networks alone. It works table by table,
// so that a change has to wait for one table only.
func (d *Driver) Check(ctx context.Context) error {
	report, err := d.Compare(ctx, true)
	d.mended.Add(uint64(len(report.Findings) + report.More))
	for i, f := range report.Findings {
		if i == maxLogged {
			d.log.Warn("mended more", "differences", len(report.Findings)+report.More-i)
			break
		}
		d.log.Warn("mended a difference from the record", "table", f.Table, "kind", f.Kind, "object", f.Object, "state", f.State, "error", f.Err)
	}
	return err
}

// Mended counts the differences that Check found since the driver was made.
func (d *Driver) Mended() uint64 { return d.mended.Load() }

// maxLogged bounds the lines that one check writes.
const maxLogged = 50

// Compare compares everything with the kernel and names each difference. With repair they are mended at once; the error tells what could not
// be mended or not be compared.
func (d *Driver) Compare(ctx context.Context, repair bool) (Report, error) {
	a := link.NewAudit(!repair)
	errs := []error{d.awaitAllDeparted(ctx),
		d.audited(a, "mesh", func() error { return d.checkMesh(a) })}
	d.mu.Lock()
	networks := slices.Clone(d.cfg.Networks)
	d.mu.Unlock()
	for i := range networks {
		if ctx.Err() == nil {
			errs = append(errs, d.audited(a, "network "+networks[i].Name, func() error { return d.checkNetwork(a, networks[i].ID) }))
		}
	}
	errs = append(errs, d.audited(a, "bridges", func() error {
		if len(d.bridges) == 0 {
			return nil
		}
		return d.setBridges(d.bridges, true)
	}), d.audited(a, "firewall", func() error { return d.passFirewalls(true) }), d.checkSandboxes(ctx, a), ctx.Err())
	var r Report
	r.Findings, r.More = a.Findings()
	return r, errors.Join(errs...)
}

func (d *Driver) step(f func() error) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return f()
}

// audited carries out f while the audit watches all that it may write with. An error of a dry run follows from what was found, because what is
// missing is not made.
func (d *Driver) audited(a *link.Audit, table string, f func() error) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	first := a.Count()
	a.Enter(table)
	d.watch(a)
	d.dry = a.Dry()
	err := f()
	d.dry = false
	d.watch(nil)
	switch {
	case err == nil:
	case !a.Dry():
		a.Failed(first, err)
	case a.Count() > first:
		err = nil
	default:
		a.Add("table", table, "cannot be compared: "+err.Error())
		err = nil
	}
	return err
}

func (d *Driver) watch(a *link.Audit) {
	d.auditing = a
	d.conn.Watch(a)
	d.host.Watch(a)
	d.nft.Watch(a)
	for _, r := range d.routers {
		r.watch(a)
	}
}

func (r *router) watch(a *link.Audit) {
	r.conn.Watch(a)
	r.ns.Watch(a)
	r.nft.Watch(a)
}

func (d *Driver) checkMesh(a *link.Audit) error {
	if !d.have {
		return nil
	}
	left, err := d.leftRouters()
	for _, f := range left {
		a.Add("namespace", f, "surplus")
	}
	if a.Dry() {
		defer d.mesh.forget() // nothing of it was written
	} else {
		d.removeRouters(true)
	}
	return errors.Join(err, d.applyMesh(true), d.guardEncrypted(true))
}

// leftRouters are files of router namespaces that no network has.
func (d *Driver) leftRouters() ([]string, error) {
	_, files, err := d.netnsFiles()
	for i := range d.cfg.Networks {
		name := filepath.Base(d.routerFile(d.cfg.Networks[i].ID))
		files = slices.DeleteFunc(files, func(f string) bool { return f == name })
	}
	return slices.DeleteFunc(files, func(f string) bool { return d.routerOfFile(f) != nil }), err
}

func (d *Driver) checkNetwork(a *link.Audit, id string) error {
	i := slices.IndexFunc(d.cfg.Networks, func(nw Network) bool { return nw.ID == id })
	if i < 0 {
		return nil // it went meanwhile
	}
	nw := &d.cfg.Networks[i]
	r := d.routers[id]
	if !d.keepRouter(a, r, d.routerFile(id)) {
		return nil
	}
	err := d.applyNetwork(nw, true)
	if a.Dry() {
		r.forget()
	}
	return err
}

// keepRouter sees to it that the file of a router's namespace leads to it: somebody may have unmounted it, and the next daemon would find
// none. The namespace lives on while this one has it open. It returns false when there is nothing to compare.
func (d *Driver) keepRouter(a *link.Audit, r *router, file string) bool {
	if r == nil {
		a.Add("namespace", filepath.Base(file), "missing")
		return !a.Dry()
	}
	cur, err := link.OpenNS(file)
	if err == nil {
		same := cur.Same(r.ns)
		cur.Close()
		if same {
			return true
		}
	}
	a.Add("namespace", filepath.Base(file), "missing: its file leads elsewhere")
	if a.Dry() {
		return false
	}
	if err := errors.Join(link.RemoveNS(file), r.ns.Mount(file)); err != nil {
		d.log.Warn("a router's namespace has no file any more and is made anew", "file", file, "error", err)
	}
	return true
}

// checkSandboxes looks at the outer ends of all legs, and at what answers names inside. The inner ends belong to the containers.
func (d *Driver) checkSandboxes(ctx context.Context, a *link.Audit) error {
	d.mu.Lock()
	if d.have && !a.Dry() {
		d.tellSandboxes(ctx)
		d.takeWaiting(ctx)
	}
	ids := slices.Sorted(maps.Keys(d.boxes))
	d.mu.Unlock()
	var err error
	for part := range slices.Chunk(ids, boxesPerStep) {
		if ctx.Err() != nil {
			break
		}
		err = errors.Join(err, d.checkBoxes(ctx, a, part))
	}
	return err
}

func (d *Driver) checkBoxes(ctx context.Context, a *link.Audit, ids []string) error {
	var damaged []string
	err := d.audited(a, "containers", func() error {
		links := map[*link.Conn]map[string]link.Link{}
		var errs []error
		for _, id := range ids {
			b := d.boxes[id]
			if b == nil { // it went meanwhile
				continue
			}
			a.Enter("container " + id[:min(len(id), 12)])
			ok, err := d.checkBox(a, b.spec, links)
			if !ok {
				damaged = append(damaged, id)
			} else if err != nil {
				errs = append(errs, fmt.Errorf("network of container %s: %w", id, err))
			}
		}
		return errors.Join(errs...)
	})
	if a.Dry() {
		return err
	}
	for _, id := range damaged {
		e := d.step(func() error {
			if b := d.boxes[id]; b != nil {
				return d.mendSandbox(ctx, b.spec)
			}
			return nil
		})
		if e != nil {
			err = errors.Join(err, fmt.Errorf("network of container %s: %w", id, e))
		}
	}
	return err
}

// remount gives a container's namespace its file back, which somebody removed. The socket of its names is in it.
func (d *Driver) remount(id string) error {
	conn, ok := d.dns.Socket(id).(syscall.Conn)
	if !ok {
		return errors.New("nothing leads to its namespace any more: restart the container")
	}
	ns, err := link.NSOfSocket(conn)
	if err != nil {
		return err
	}
	defer ns.Close()
	return errors.Join(link.RemoveNS(d.sandboxFile(id)), ns.Mount(d.sandboxFile(id)))
}

// checkBox compares one container's legs. It returns false for one that must be mended from the inside, too, because an end is gone.
func (d *Driver) checkBox(a *link.Audit, s Sandbox, links map[*link.Conn]map[string]link.Link) (ok bool, err error) {
	if ns, err := link.OpenNS(d.sandboxFile(s.ID)); err != nil {
		a.Add("namespace", s.ID, "missing: "+err.Error())
		if a.Dry() {
			return false, nil
		}
		if err := d.remount(s.ID); err != nil {
			return true, err
		}
	} else {
		ns.Close()
	}
	plans, err := d.plans(s)
	if err != nil {
		return true, err
	}
	ok = true
	if !d.hasStations(s.ID, s) {
		a.Add("device", "macvlan", "missing")
		ok = false
	}
	for _, p := range plans {
		if p.own != nil && p.own.macvlan != nil {
			continue // has no outer end
		}
		if links[p.outer] == nil {
			if links[p.outer], err = p.outer.Links(); err != nil {
				return true, err
			}
		}
		l, there := links[p.outer][p.outerName]
		switch {
		case !there:
			a.Add("device", p.outerName, "missing")
			ok = false
		case !l.Up:
			a.Add("device", p.outerName, "differs: it is down")
			ok = false
		default:
			err = errors.Join(err, p.settle(l, false), p.attach(l.Index))
		}
	}
	if s.DNS && !d.dns.Serves(s.ID) {
		a.Add("DNS", dnsResolver, "missing: nothing answers")
		ok = false
	}
	return ok, err
}
