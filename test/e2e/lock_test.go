package e2e

import (
	"bytes"
	"context"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/moby/moby/client"

	"skein/test/lab"
)

// TestAutolock: a locked manager that restarts serves its containers and nothing else until it is unlocked, and its disk holds no key in
// plain.
func TestAutolock(t *testing.T) {
	l := lab.New(t, "e6", 1, 0)
	l.Must(0, "service", "create", "-d", "--name", "web", "-p", "8080:8080", l.Image("v1"))
	running(t, l, 0, "web", 1, 20*time.Second)
	before := pids(t, l, 0)
	if !strings.Contains(l.Must(0, "swarm", "update", "--autolock=true"), "SWMKEY-1-") {
		t.Fatal("no key was shown")
	}
	key := strings.TrimSpace(l.Must(0, "swarm", "unlock-key", "-q"))
	state := filepath.Join(l.Nodes[0].StateDir, "cluster")
	l.Eventually(10*time.Second, "the data keys are locked", func() (bool, string) {
		b, err := os.ReadFile(filepath.Join(state, "keys.json"))
		return err == nil && bytes.Contains(b, []byte(`"Locked":true`)), string(b)
	})
	if found := plainKeys(t, state); len(found) > 0 {
		t.Errorf("keys in plain: %v", found)
	}
	killDaemon(t, l, 0)
	start(t, l, 0)
	if out := l.Must(0, "info", "--format", "{{.Swarm.LocalNodeState}}"); strings.TrimSpace(out) != "locked" {
		t.Errorf("state %q", out)
	}
	if _, e, code := l.Docker(0, "service", "ls"); code == 0 || !strings.Contains(e, `Please use "docker swarm unlock" to unlock it`) {
		t.Errorf("service ls of a locked manager: exit code %d, %s", code, e)
	}
	if now := pids(t, l, 0); now != before {
		t.Errorf("containers changed:\n%s\n%s", before, now)
	}
	if body, err := lab.Get("http://"+l.Nodes[0].Address+":8080/", 5*time.Second); err != nil {
		t.Errorf("the published port does not answer: %v, %q", err, body)
	}
	if err := unlock(t, l, "SWMKEY-1-"+strings.Repeat("A", 43)); err == nil || !strings.Contains(err.Error(), "invalid key provided") {
		t.Errorf("a wrong key: %v", err)
	}
	if err := unlock(t, l, key); err != nil {
		t.Fatal(err)
	}
	running(t, l, 0, "web", 1, 20*time.Second)
	if now := pids(t, l, 0); now != before {
		t.Errorf("containers changed by unlocking:\n%s\n%s", before, now)
	}
	l.Must(0, "service", "scale", "-d", "web=2")
	running(t, l, 0, "web", 2, 20*time.Second)
}

func unlock(t *testing.T, l *lab.Lab, key string) error {
	t.Helper()
	c, err := client.New(client.WithHost("unix://" + l.Nodes[0].Socket))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	_, err = c.SwarmUnlock(ctx, client.SwarmUnlockOptions{Key: key})
	return err
}

// plainKeys lists files below dir with a private key.
func plainKeys(t *testing.T, dir string) (found []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(path)
		if bytes.Contains(b, []byte("PRIVATE KEY")) {
			found = append(found, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}
