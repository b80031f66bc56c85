package engine

import (
	"errors"
	"strings"
	"testing"

	"skein/agent/task"
	"skein/manager/api"
)

// A node that cannot encrypt rejects a task of an encrypted network with the reason, and says it to the managers.
func TestTaskRejectedWithoutEncryption(t *testing.T) {
	b := newBench(t)
	b.net.cryptErr = errors.New("this node cannot encrypt: no TUN")
	a := &api.Assignment{TaskId: "t1", ServiceName: "web", Slot: 1, SpecJson: []byte(`{"ContainerSpec":{"Image":"busybox"}}`),
		Attachments: []*api.Attachment{{NetworkId: "n1", Addr4: "10.7.0.5/24"}}}
	nets := map[string]*api.NetworkRecord{"n1": {Id: "n1", Name: "secret", Encrypted: true}}
	ctl, err := b.e.Controller(a, nets, nil)
	if err != nil {
		t.Fatal(err)
	}
	var fatal task.Fatal
	if err := ctl.Prepare(t.Context()); !errors.As(err, &fatal) || !strings.Contains(err.Error(), "network secret is encrypted: this node cannot encrypt: no TUN") {
		t.Errorf("prepare: %v", err)
	}
	if c := b.e.CryptKeys(); len(c.Keys) != 0 || !strings.Contains(c.Err, "no TUN") {
		t.Errorf("said to the managers: %v", c)
	}
}

// Keys that make no sense are left out: nothing is sent to such a node.
func TestCryptKeys(t *testing.T) {
	good := &api.CryptKey{Slot: 1, PublicKey: make([]byte, 32), Port: 51841}
	got := cryptKeys([]*api.CryptKey{{Slot: 2, PublicKey: make([]byte, 32), Port: 1}, {PublicKey: make([]byte, 31), Port: 1}, {PublicKey: make([]byte, 32)}, good})
	if len(got) != 1 || got[0].Slot != 1 || got[0].Port != 51841 {
		t.Errorf("keys %v", got)
	}
}
