package cluster

import (
	"context"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/moby/moby/api/types/swarm"

	"skein/agent/identity"
	"skein/agent/transport"
	"skein/manager/api"
)

// setRole asks through n for another role of a node.
func (n *node) setRole(t *testing.T, nodeID, role string) error {
	t.Helper()
	ctl := n.mgr.Control()
	for {
		o, err := ctl.GetNode(within(t, 20*time.Second), &api.GetRequest{Ref: nodeID})
		if err != nil {
			return err
		}
		var sn swarm.Node
		if err := json.Unmarshal(o.Json, &sn); err != nil {
			t.Fatal(err)
		}
		sn.Spec.Role = swarm.NodeRole(role)
		spec, err := json.Marshal(sn.Spec)
		if err != nil {
			t.Fatal(err)
		}
		_, err = ctl.UpdateNode(within(t, 20*time.Second), &api.UpdateRequest{Ref: nodeID, Version: sn.Version.Index, SpecJson: spec})
		if err == nil || !strings.Contains(err.Error(), "out of sequence") {
			return err
		}
	}
}

// renew gets the node a certificate of its newest role through another manager.
func (n *node) renew(t *testing.T, through *node) error {
	t.Helper()
	conn, err := transport.DialGRPC(through.addr, n.id.ClientTLS(api.RoleManager))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	return n.id.Renew(within(t, 20*time.Second), conn)
}

func TestDemoteLeaderAndPromoteAgain(t *testing.T) {
	t.Parallel()
	ns := three(t)
	leader := leaderOf(ns)
	var rest []*node
	for _, n := range ns {
		if n != leader {
			rest = append(rest, n)
		}
	}
	began := time.Now()
	if err := rest[0].setRole(t, leader.id.NodeID(), api.RoleWorker); err != nil {
		t.Fatalf("demote the leader: %v", err)
	}
	if err := leader.renew(t, rest[0]); err != nil {
		t.Fatalf("renew as worker: %v", err)
	}
	if leader.id.Role() != api.RoleWorker {
		t.Fatalf("certificate of a %s", leader.id.Role())
	}
	t.Logf("worker's certificate after %v", time.Since(began).Round(time.Millisecond))
	for _, n := range rest {
		if got := len(n.mgr.Managers()); got != 2 {
			t.Errorf("%d members when the certificate was issued, want 2", got)
		}
	}
	leader.stop()
	rest[0].mustCreate(t, "without")
	if err := rest[0].setRole(t, leader.id.NodeID(), api.RoleManager); err != nil {
		t.Fatalf("promote: %v", err)
	}
	if err := leader.renew(t, rest[1]); err != nil || leader.id.Role() != api.RoleManager {
		t.Fatalf("renew as manager: %v, role %s", err, leader.id.Role())
	}
	// Its old log is still there: it was out of the group and must come back in.
	back := start(t, leader.dir, leader.addr, rest[0].addr, rest[1].addr)
	eventually(t, 15*time.Second, "three members again", func() bool {
		return len(rest[0].mgr.Managers()) == 3 && len(back.mgr.Managers()) == 3 && back.mgr.LeaderAddr() != ""
	})
	if got := back.services(t); len(got) != 1 {
		t.Errorf("the promoted manager lists %v", got)
	}
}

// A follower that is demoted and promoted before it noticed comes back by itself.
func TestDemotedAndPromotedAtOnce(t *testing.T) {
	t.Parallel()
	ns := three(t)
	leader := leaderOf(ns)
	var f *node
	for _, n := range ns {
		if n != leader {
			f = n
		}
	}
	if err := leader.setRole(t, f.id.NodeID(), api.RoleWorker); err != nil {
		t.Fatal(err)
	}
	eventually(t, 5*time.Second, "two members", func() bool { return len(leader.mgr.Managers()) == 2 })
	if err := leader.setRole(t, f.id.NodeID(), api.RoleManager); err != nil {
		t.Fatal(err)
	}
	eventually(t, 20*time.Second, "three members again", func() bool { return len(leader.mgr.Managers()) == 3 && f.mgr.LeaderAddr() != "" })
}

func TestDemotionRefused(t *testing.T) {
	t.Parallel()
	ns := three(t)
	leader := leaderOf(ns)
	var rest []*node
	for _, n := range ns {
		if n != leader {
			rest = append(rest, n)
		}
	}
	rest[0].stop()
	eventually(t, 10*time.Second, "the stopped manager shows as unreachable", func() bool {
		o, err := leader.mgr.Control().GetNode(within(t, 10*time.Second), &api.GetRequest{Ref: rest[0].id.NodeID()})
		return err == nil && strings.Contains(string(o.Json), `"Reachability":"unreachable"`)
	})
	if err := leader.setRole(t, rest[1].id.NodeID(), api.RoleWorker); err == nil || !strings.Contains(err.Error(), "loss of quorum") {
		t.Errorf("demote one of two that are up: %v", err)
	}
	if err := leader.setRole(t, rest[0].id.NodeID(), api.RoleWorker); err != nil {
		t.Errorf("demote the one that is down: %v", err)
	}
	eventually(t, 5*time.Second, "two members", func() bool { return len(leader.mgr.Managers()) == 2 })
	if _, err := leader.mgr.Control().RemoveNode(within(t, 10*time.Second), &api.RemoveRequest{Ref: rest[0].id.NodeID(), Force: true}); err != nil {
		t.Errorf("remove the demoted one: %v", err)
	}
	if err := leader.setRole(t, rest[1].id.NodeID(), api.RoleWorker); err != nil {
		t.Errorf("demote the second: %v", err)
	}
	eventually(t, 5*time.Second, "one member", func() bool { return len(leader.mgr.Managers()) == 1 })
	if err := leader.setRole(t, leader.id.NodeID(), api.RoleWorker); err == nil || !strings.Contains(err.Error(), "attempting to demote the last manager of the swarm") {
		t.Errorf("demote the last: %v", err)
	}
}

func TestPlannedStopIsQuick(t *testing.T) {
	t.Parallel()
	ns := three(t)
	leader := leaderOf(ns)
	var rest []*node
	for _, n := range ns {
		if n != leader {
			rest = append(rest, n)
		}
	}
	began := time.Now()
	leader.mgr.HandOver(context.Background())
	handed := time.Since(began)
	leader.stop()
	rest[0].mustCreate(t, "after")
	t.Logf("handed over after %v, first write after %v", handed.Round(time.Millisecond), time.Since(began).Round(time.Millisecond))
	if time.Since(began) > 3*time.Second { // 0.5 s on a machine that is not busy with other tests
		t.Errorf("first write %v after a planned stop", time.Since(began))
	}
}

// A worker's certificate becomes a manager's when the store says so, and not before.
func TestPromotedWorkerJoins(t *testing.T) {
	t.Parallel()
	a := first(t)
	dir, addr := t.TempDir(), freeAddr(t)
	w, err := identity.Join(within(t, 20*time.Second), a.addr, a.cluster(t).JoinTokens.Worker, identity.JoinOptions{StateDir: dir, Hostname: "w", RPCAddr: addr})
	if err != nil {
		t.Fatal(err)
	}
	if err := a.setRole(t, w.NodeID(), api.RoleManager); err != nil {
		t.Fatal(err)
	}
	n := &node{id: w}
	if err := n.renew(t, a); err != nil || w.Role() != api.RoleManager {
		t.Fatalf("renew: %v, role %s", err, w.Role())
	}
	b := start(t, dir, addr, a.addr)
	eventually(t, 15*time.Second, "two members", func() bool { return len(a.mgr.Managers()) == 2 && b.mgr.LeaderAddr() != "" })
	b.mustCreate(t, "web")
}
