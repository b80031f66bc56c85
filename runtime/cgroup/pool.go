package cgroup

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

const (
	// readyPrefix begins the names of groups that wait for a container. No container's name begins so.
	readyPrefix = "_ready-"
	// readyGroups are kept: as many containers as start at once now and then.
	readyGroups = 4
	// refillDelay leaves the machine to the container that took a group.
	refillDelay = 20 * time.Millisecond
)

// Pool makes groups below one parent, the costly v1 ones ahead: eight of them take longer than the rest of a container's groups and limits,
// and v1 groups can be renamed. On hosts with v2 alone it keeps none. Groups that an earlier pool of the same parent left are removed.
type Pool struct {
	host   *Host
	parent string
	rules  []specs.LinuxDeviceCgroup // set in ready groups already

	mu     sync.Mutex
	ready  []*Group
	made   int
	timer  *time.Timer // of the refill that is due, nil without
	closed bool
	work   sync.WaitGroup
}

// NewPool makes a pool whose ready groups have the device rules that most containers want. It begins to fill itself at once.
func (h *Host) NewPool(parent string, rules []specs.LinuxDeviceCgroup) (*Pool, error) {
	if err := checkParent(parent); err != nil {
		return nil, err
	}
	p := &Pool{host: h, parent: parent, rules: rules}
	if err := p.removeOld(); err != nil {
		return nil, err
	}
	p.mu.Lock()
	p.refillLater(0)
	p.mu.Unlock()
	return p, nil
}

// removeOld removes ready groups of a process that died.
func (p *Pool) removeOld() error {
	var errs []error
	for _, dir := range p.host.roots(p.parent) {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
		for _, e := range entries {
			if e.IsDir() && strings.HasPrefix(e.Name(), readyPrefix) {
				errs = append(errs, removeDir(filepath.Join(dir, e.Name())))
			}
		}
	}
	return errors.Join(errs...)
}

// refillLater has the pool filled after a while. The caller holds mu.
func (p *Pool) refillLater(after time.Duration) {
	if p.closed || p.timer != nil || len(p.host.v1) == 0 {
		return
	}
	p.work.Add(1)
	p.timer = time.AfterFunc(after, p.refill)
}

// refill makes as many as are missing. A failure is not told here: the next container's group is made anew and says why it cannot be.
func (p *Pool) refill() {
	defer p.work.Done()
	for {
		p.mu.Lock()
		if p.closed || len(p.ready) >= readyGroups {
			p.timer = nil
			p.mu.Unlock()
			return
		}
		p.made++
		name := fmt.Sprintf("%s%d", readyPrefix, p.made)
		p.mu.Unlock()
		g, err := p.prepare(name)
		p.mu.Lock()
		if err != nil {
			p.timer = nil
			p.mu.Unlock()
			return
		}
		p.ready = append(p.ready, g)
		p.mu.Unlock()
	}
}

// prepare makes the v1 part of a group.
func (p *Pool) prepare(name string) (*Group, error) {
	g, err := p.host.Open(p.parent, name)
	if err != nil {
		return nil, err
	}
	g.v2 = ""
	if err = g.make(); err == nil && p.host.v1["devices"] != "" {
		err = g.devices(p.rules)
	}
	if err == nil && p.host.v1["pids"] != "" {
		err = g.defaultPids()
	}
	if err != nil {
		return nil, errors.Join(err, g.Remove())
	}
	return g, nil
}

// Create is Host.Create below the pool's parent.
func (p *Pool) Create(id string, r *specs.LinuxResources) (*Group, error) {
	ready := p.take(r)
	if ready == nil {
		return p.host.Create(p.parent, id, r)
	}
	g, err := p.use(ready, id, r)
	if errors.Is(err, errUnusable) {
		return p.host.Create(p.parent, id, r)
	}
	return g, err
}

// take returns a ready group, nil without one, or when rules are asked that do not begin with those that it has.
func (p *Pool) take(r *specs.LinuxResources) *Group {
	if r == nil || len(r.Devices) < len(p.rules) || !reflect.DeepEqual(r.Devices[:len(p.rules)], p.rules) {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.refillLater(refillDelay)
	n := len(p.ready)
	if n == 0 {
		return nil
	}
	g := p.ready[n-1]
	p.ready = p.ready[:n-1]
	return g
}

// errUnusable says that a ready group could not become the container's and is gone.
var errUnusable = errors.New("ready cgroup is not usable")

// use gives a ready group its container's name and limits.
func (p *Pool) use(ready *Group, id string, r *specs.LinuxResources) (*Group, error) {
	g, err := p.host.Open(p.parent, id)
	if err != nil {
		return nil, errors.Join(err, ready.Remove())
	}
	for i, d := range g.v1 {
		if err = p.rename(d, ready.v1[i].Path); err != nil {
			return nil, errors.Join(errUnusable, err, ready.Remove(), g.removeFirst(i))
		}
	}
	if g.v2 != "" {
		if err = mkdir(g.v2); err == nil {
			g.host.delegate(p.parent, true)
		}
	}
	if err == nil {
		err = g.Update(r)
	}
	if err == nil && r.Pids == nil && p.host.v1["pids"] == "" { // else it was set ahead
		err = g.defaultPids()
	}
	if err == nil && p.host.v1["devices"] == "" {
		err = g.devices(r.Devices)
	} else if err == nil {
		err = g.devices(r.Devices[len(p.rules):])
	}
	if err != nil {
		return nil, errors.Join(err, g.Remove())
	}
	return g, nil
}

// rename moves a ready group to its place; a group that is there already stays and is used, as Create does.
func (p *Pool) rename(d Dir, from string) error {
	if d.Controller == "cpuset" { // the parent's may have changed since
		if _, err := inheritCpuset(filepath.Dir(from), from); err != nil {
			return err
		}
	}
	return unix.Rename(from, d.Path)
}

// removeFirst removes the first n v1 directories.
func (g *Group) removeFirst(n int) error {
	var errs []error
	for _, d := range slices.Clone(g.v1[:n]) {
		errs = append(errs, removeDir(d.Path))
	}
	return errors.Join(errs...)
}

// Close removes the ready groups.
func (p *Pool) Close() error {
	p.mu.Lock()
	p.closed = true
	if p.timer != nil && p.timer.Stop() {
		p.timer = nil
		p.work.Done()
	}
	p.mu.Unlock()
	p.work.Wait()
	var errs []error
	for _, g := range p.ready {
		errs = append(errs, g.Remove())
	}
	p.ready = nil
	return errors.Join(errs...)
}
