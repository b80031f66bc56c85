package certs_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/swarm"

	"skein/manager/api"
	"skein/manager/ca"
	"skein/manager/store"
)

const day = 24 * time.Hour

// TestYear: five nodes live through a year with certificates of 90 days. The leader changes each week, and is missing for half a day each
// month. Whoever meets whom, once a day, is accepted; every certificate is renewed before a fifth of its life is left, but for the time
// without a leader.
func TestYear(t *testing.T) {
	bubble(t, swarm.CAConfig{}, func(w *world, first *node) {
		nodes := []*node{first, w.join("m2", api.RoleManager), w.join("m3", api.RoleManager), w.join("w1", api.RoleWorker), w.join("w2", api.RoleWorker)}
		least := ca.NodeCertLife
		for d := range 366 {
			if d%7 == 6 {
				w.unlead()
				if d%28 == 27 {
					time.Sleep(12 * time.Hour)
				}
				w.lead(nodes[rand.IntN(3)].name)
			}
			for i, n := range nodes {
				for j, o := range nodes {
					if i == j || (d+i+j)%3 != 0 {
						continue
					}
					if err := n.meets(o); err != nil {
						t.Fatalf("day %d: %s and %s: %v", d, n.name, o.name, err)
					}
				}
				_, until := n.id.Validity()
				least = min(least, time.Until(until))
			}
			time.Sleep(day)
		}
		for _, n := range nodes {
			if n.renewed < 4 || n.renewed > 9 {
				t.Errorf("%s renewed its certificate %d times in a year", n.name, n.renewed)
			}
			n.halt()
		}
		if least < ca.NodeCertLife/5-day {
			t.Errorf("a certificate was renewed %v before its end, want at least a fifth of %v", least, ca.NodeCertLife)
		}
		t.Logf("the shortest rest of a certificate's life was %v", least.Round(time.Hour))
	})
}

// TestShortLives: --cert-expiry of an hour works, too.
func TestShortLives(t *testing.T) {
	bubble(t, swarm.CAConfig{NodeCertExpiry: time.Hour}, func(w *world, first *node) {
		nodes := []*node{first, w.join("m2", api.RoleManager), w.join("w1", api.RoleWorker)}
		for i := range 4 * 24 {
			if i%24 == 23 {
				w.unlead()
				time.Sleep(10 * time.Minute)
				w.lead(nodes[i%2].name)
			}
			for j, n := range nodes {
				if err := n.meets(nodes[(j+1)%3]); err != nil {
					t.Fatalf("after %d quarters of an hour: %v", i, err)
				}
			}
			time.Sleep(15 * time.Minute)
		}
		for _, n := range nodes {
			n.halt()
		}
	})
}

// TestAwayTooLong: a node that was off for longer than its certificate lives is told so, and what to do; doing it works.
func TestAwayTooLong(t *testing.T) {
	bubble(t, swarm.CAConfig{}, func(w *world, first *node) {
		n := w.join("w1", api.RoleWorker)
		n.halt()
		time.Sleep(91 * day)
		err := n.reboot()
		if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "expired on 2000-03-31") || !strings.Contains(err.Error(), "docker swarm leave --force") {
			t.Fatalf("%v", err)
		}
		back := w.join("w1", api.RoleWorker)
		if err := back.meets(first); err != nil {
			t.Error(err)
		}
		back.halt()
		first.halt()
	})
}

// TestAwayWhileRunning: a node that is cut off past its certificate's end is refused by the others, and knows why.
func TestAwayWhileRunning(t *testing.T) {
	bubble(t, swarm.CAConfig{}, func(w *world, first *node) {
		m2 := w.join("m2", api.RoleManager)
		m2.stop() // does not renew
		time.Sleep(91 * day)
		if err := first.meets(m2); err == nil || !strings.Contains(err.Error(), "good from 1999-12-31T23:00:00Z to 2000-03-31T00:00:00Z") || !strings.Contains(err.Error(), "clocks") {
			t.Errorf("%v", err)
		}
		m2.halt()
		first.halt()
	})
}

// live makes a cluster of three managers and some workers with agents, and a service with a task on each worker.
func live(w *world, first *node, workers int) (nodes []*node, tasks []string) {
	nodes = []*node{first.withAgent(), w.join("m2", api.RoleManager).withAgent(), w.join("m3", api.RoleManager).withAgent()}
	create := &api.TaskCreate{ServiceId: strings.Repeat("s", 25), Revision: 1}
	place := &api.TaskPlacement{}
	for i := range workers {
		n := w.join(fmt.Sprintf("w%d", i+1), api.RoleWorker).withAgent()
		nodes = append(nodes, n)
		create.Items = append(create.Items, &api.TaskCreate_Item{Slot: uint64(i + 1), Desired: uint32(api.TaskRunning), Generation: 1})
		place.TaskIds = append(place.TaskIds, api.TaskID(create.ServiceId, uint64(i+1), "", 1))
		place.NodeIds = append(place.NodeIds, n.id.NodeID())
	}
	spec := swarm.ServiceSpec{Annotations: swarm.Annotations{Name: "s"}, TaskTemplate: swarm.TaskSpec{ContainerSpec: &swarm.ContainerSpec{Image: "i"}}}
	b, err := json.Marshal(spec)
	w.ok(err)
	w.apply(&api.Change{Kind: &api.Change_PutService{PutService: &api.ServiceRecord{Id: create.ServiceId, Name: "s", SpecJson: b}}})
	w.apply(&api.Change{Kind: &api.Change_CreateTasks{CreateTasks: create}}, &api.Change{Kind: &api.Change_PlaceTasks{PlaceTasks: place}})
	w.eventually("the service runs", 30*time.Second, func() bool { return w.running(place.TaskIds) })
	return nodes, place.TaskIds
}

func (w *world) running(tasks []string) bool {
	up := 0
	w.store.View(func(tx store.ReadTx) {
		for _, id := range tasks {
			if t := tx.Task(id); t != nil && t.State == api.TaskRunning && t.Desired == api.TaskRunning {
				up++
			}
		}
	})
	return up == len(tasks)
}

// renewedTo reports whether all of some nodes have told of certificates under the root that signs now, and trust it.
func (w *world) renewedTo(nodes []*node) bool {
	want := ca.NewWanted(w.cluster())
	for _, n := range nodes {
		if !want.Has(w.record(n.id.NodeID()).GetTls()) {
			return false
		}
	}
	return true
}

// TestRotation: the root certificate of ten nodes is replaced while one is away, the leader is lost midway, and the replacement is begun
// a second time. The live nodes have new certificates within 30 s, nobody ever refuses anybody, no task is touched, and the node that was away
// comes back.
func TestRotation(t *testing.T) {
	bubble(t, swarm.CAConfig{}, func(w *world, first *node) {
		nodes, tasks := live(w, first, 7)
		away := nodes[9]
		away.halt()
		rest := nodes[:9]
		everybody := func(when string) {
			t.Helper()
			for i, n := range rest {
				if err := n.meets(rest[(i+1)%len(rest)]); err != nil {
					t.Fatalf("%s: %s and %s: %v", when, n.name, rest[(i+1)%len(rest)].name, err)
				}
			}
		}
		old := w.cluster()
		began := time.Now()
		w.reconfigure(swarm.CAConfig{ForceRotate: 1})
		w.unlead() // before anybody has renewed
		everybody("without a leader")
		time.Sleep(3 * time.Second)
		w.lead("m2")
		time.Sleep(200 * time.Millisecond)
		everybody("while some have new certificates")
		w.reconfigure(swarm.CAConfig{ForceRotate: 2})
		everybody("begun again")
		w.eventually("live nodes have new certificates", 30*time.Second, func() bool { everybody("midway"); return w.renewedTo(rest) })
		t.Logf("9 live nodes renewed twice, with a leader lost, in %v", time.Since(began))
		if w.cluster().Rotation == nil {
			t.Fatal("the rotation ended without the node that is away: it could not come back")
		}
		time.Sleep(time.Hour)
		w.ok(away.reboot())
		away.withAgent()
		rest = nodes
		took := w.eventually("the node is back and the rotation over", 30*time.Second, func() bool { return w.cluster().Rotation == nil })
		t.Logf("the last node came back and all was over in %v", took)
		w.eventually("all trust the new root alone", 10*time.Second, func() bool {
			for _, n := range nodes {
				if len(n.id.TLS().Trust) != 1 {
					return false
				}
			}
			return true
		})
		everybody("in the end")
		if c := w.cluster(); bytes.Equal(c.CaCertPem, old.CaCertPem) || c.WorkerToken == old.WorkerToken {
			t.Error("root or token did not change")
		}
		w.join("late", api.RoleWorker).halt()
		if !w.running(tasks) {
			t.Error("a task does not run any more")
		}
		for _, n := range nodes {
			n.halt()
			w.ok(n.reboot()) // what is on disk fits together
			n.halt()
		}
	})
}

// TestRolesFollowTheStore: a node is promoted and demoted at random while it renews its certificate, and leaves and joins. Its certificate
// never says more than the store said when it was made, and a request never gets more than the store says now.
func TestRolesFollowTheStore(t *testing.T) {
	for seed := range uint64(8) {
		bubble(t, swarm.CAConfig{}, func(w *world, first *node) {
			rnd := rand.New(rand.NewPCG(seed, 1))
			n := w.join("w1", api.RoleWorker)
			for step := range 40 {
				switch rnd.IntN(4) {
				case 0:
					w.setRole(n.id.NodeID(), []string{api.RoleManager, api.RoleWorker}[rnd.IntN(2)])
				case 1:
					n.id.RenewSoon() // in flight while the next step happens
				case 2:
					if rnd.IntN(4) > 0 {
						break
					}
					w.apply(&api.Change{Kind: &api.Change_DeleteNode{DeleteNode: n.id.NodeID()}})
					if allowed(n) == nil {
						t.Fatalf("seed %d, step %d: a removed node is let in", seed, step)
					}
					n.halt()
					n = w.join("w1", api.RoleWorker)
				case 3:
					time.Sleep(time.Duration(rnd.IntN(1000)) * time.Millisecond)
				}
				rec := w.record(n.id.NodeID())
				if rec.Role == api.RoleWorker && allowed(n) == nil {
					t.Fatalf("seed %d, step %d: a worker with a certificate that says %s may do what managers may", seed, step, n.id.Role())
				}
			}
			n.id.RenewSoon()
			w.eventually("the certificate says what the store says", time.Minute, func() bool {
				n.id.RenewSoon()
				return n.id.Role() == w.record(n.id.NodeID()).Role
			})
			if manager := w.record(n.id.NodeID()).Role == api.RoleManager; manager != (allowed(n) == nil) {
				t.Errorf("seed %d: manager %v, but %v", seed, manager, allowed(n))
			}
			n.halt()
			first.halt()
			synctest.Wait()
		})
	}
}

// allowed asks the first manager for what only managers may.
func allowed(n *node) error {
	conn, err := n.w.dial("m1", n.id.ClientTLS(""))
	n.w.ok(err)
	defer conn.Close()
	_, err = api.NewAgentClient(conn).Ping(n.w.t.Context(), &api.Empty{})
	return err
}
