package virtual

import (
	"crypto/tls"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
	"skein/manager/store"
)

// bootstrapTLS is what a node without a certificate has; the token's digest, which replaces verification, is tested elsewhere.
func bootstrapTLS() *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS13, InsecureSkipVerify: true}
}

func bubble(t *testing.T, n int, f func(g *group)) {
	synctest.Test(t, func(t *testing.T) {
		f(found(t, n))
	})
}

// create makes a service through a manager.
func (m *member) create(name string, d time.Duration) error {
	_, err := m.mgr.Control().CreateService(m.g.within(d),
		&api.CreateRequest{SpecJson: fmt.Appendf(nil, `{"Name":%q,"TaskTemplate":{"ContainerSpec":{"Image":"i"}},"Mode":{"Replicated":{"Replicas":0}}}`, name)})
	return err
}

// write is a user who tries until it is done. It tells how long it took.
func (g *group) write(through *member, name string) time.Duration {
	g.t.Helper()
	return g.eventually("write "+name+" through "+through.name, 15*time.Second, func() bool {
		err := through.create(name, 5*time.Second)
		return err == nil || strings.Contains(err.Error(), "already exists")
	})
}

func (m *member) services(d time.Duration) ([]string, error) {
	o, err := m.mgr.Control().ListServices(m.g.within(d), &api.ListRequest{})
	if err != nil {
		return nil, err
	}
	var names []string
	for _, b := range o.Json {
		var s swarm.Service
		if err := json.Unmarshal(b, &s); err != nil {
			return nil, err
		}
		names = append(names, s.Spec.Name)
	}
	return names, nil
}

// TestLeaderIsCutOff: another takes over soon; the one that is cut off answers no read with what is old; back again, it deposes nobody.
func TestLeaderIsCutOff(t *testing.T) {
	bubble(t, 3, func(g *group) {
		for i := range 3 {
			old := g.waitLeader()
			before := fmt.Sprint("before", i)
			g.write(old, before)
			var other *member
			for _, m := range g.all {
				if m != old {
					other = m
				}
			}
			g.f.setCut(old.name, true)
			after := fmt.Sprint("after", i)
			took := g.write(other, after)
			if took > 4*time.Second {
				t.Errorf("first write %v after the leader was cut off", took)
			}
			if names, err := old.services(2 * time.Second); err == nil && !slices.Contains(names, after) {
				t.Errorf("the deposed leader answers a read without what was acknowledged: %v", names)
			}
			now := g.waitLeader()
			g.f.setCut(old.name, false)
			time.Sleep(10 * time.Second)
			if l := g.waitLeader(); l != now {
				t.Errorf("%s deposed %s when it came back", l.name, now.name)
			}
			g.same()
		}
	})
}

// TestMembershipAtRandom: managers join, leave, are demoted by removal, die and come back in any order; writes go on, stores stay equal, and
// whoever was removed has no say any more.
func TestMembershipAtRandom(t *testing.T) {
	seeds := 3
	if testing.Short() {
		seeds = 1
	}
	for seed := range seeds {
		t.Run(fmt.Sprint("seed=", seed), func(t *testing.T) {
			bubble(t, 3, func(g *group) { g.membership(rand.New(rand.NewPCG(uint64(seed), 1))) })
		})
	}
}

func (g *group) membership(r *rand.Rand) {
	made := len(g.all)
	var removed []*member
	for step := range 10 {
		g.waitLeader()
		m := g.all[r.IntN(len(g.all))]
		switch x := r.IntN(5); {
		case x == 0 && len(g.all) < 5:
			made++
			g.join(place(made))
		case x == 1 && len(g.all) > 2:
			g.t.Logf("%s leaves", m.name)
			if err := m.mgr.Leave(g.within(20 * time.Second)); err != nil {
				g.t.Fatalf("%s leaves: %v", m.name, err)
			}
			m.kill()
			g.all = slices.DeleteFunc(g.all, func(o *member) bool { return o == m })
			g.removeNode(m)
			removed = append(removed, m)
		case x == 2 && len(g.all) > 2:
			g.t.Logf("%s dies", m.name)
			m.kill()
			time.Sleep(time.Duration(r.IntN(8)) * time.Second)
			m.start(g.names(m)...)
		case x == 3 && len(g.all) > 2:
			g.f.setCut(m.name, true)
			time.Sleep(time.Duration(r.IntN(8)) * time.Second)
			g.f.setCut(m.name, false)
		case len(removed) > 0: // one that was removed comes back with its disk
			gone := removed[r.IntN(len(removed))]
			voters := len(g.waitLeader().mgr.Managers())
			gone.start(g.names(gone)...)
			time.Sleep(10 * time.Second)
			if gone.mgr.IsLeader() {
				g.t.Errorf("%s leads although it was removed", gone.name)
			}
			if err := gone.create("evil", 5*time.Second); err == nil {
				g.t.Errorf("%s writes although it was removed", gone.name)
			}
			if now := len(g.waitLeader().mgr.Managers()); now != voters {
				g.t.Errorf("%d managers, %d before one that was removed came back", now, voters)
			}
			gone.kill()
		}
		through := g.all[r.IntN(len(g.all))]
		g.write(through, fmt.Sprint("step", step))
		g.same()
	}
}

// removeNode forgets a manager that left.
func (g *group) removeNode(m *member) {
	g.t.Helper()
	g.eventually("remove node "+m.name, 20*time.Second, func() bool {
		_, err := g.waitLeader().mgr.Control().RemoveNode(g.within(10*time.Second), &api.RemoveRequest{Ref: m.id.NodeID(), Force: true})
		return err == nil || strings.Contains(err.Error(), "not found")
	})
	g.leaderView(func(tx store.ReadTx) {
		if tx.Node(m.id.NodeID()) != nil {
			g.t.Errorf("node %s is still there", m.name)
		}
	})
}
