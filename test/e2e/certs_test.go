package e2e

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"skein/test/lab"
)

// TestRootRotation: the root certificate is replaced while the leader's daemon is killed; all nodes follow, and no container notices.
func TestRootRotation(t *testing.T) {
	l := lab.New(t, "e7", 3, 1)
	l.Must(0, "service", "create", "--name", "web", "--mode", "global", l.Image("v1"))
	running(t, l, 0, "web", 4, 20*time.Second)
	var before []string
	for i := range l.Nodes {
		before = append(before, pids(t, l, i))
	}
	root, token := l.Must(0, "swarm", "ca"), l.Must(0, "swarm", "join-token", "-q", "worker")
	l.Must(0, "swarm", "ca", "--rotate", "--detach")
	lead, _ := leader(t, l, 0)
	killDaemon(t, l, lead)
	through := (lead + 1) % 3
	start(t, l, lead)
	took := rotated(t, l, through)
	t.Logf("rotated %v after the leader was back", took.Round(time.Millisecond))
	if again := l.Must(through, "swarm", "ca"); again == root || !strings.Contains(again, "BEGIN CERTIFICATE") {
		t.Errorf("the root is %s", again)
	}
	if l.Must(through, "swarm", "join-token", "-q", "worker") == token {
		t.Error("the join token is that of the old root")
	}
	began := time.Now()
	l.Must(through, "swarm", "ca", "--rotate", "--quiet") // waits
	t.Logf("a second one, waited for, took %v", time.Since(began).Round(time.Millisecond))
	rotated(t, l, through)
	running(t, l, through, "web", 4, 20*time.Second)
	for i := range l.Nodes {
		if now := pids(t, l, i); now != before[i] {
			t.Errorf("containers of %s changed:\n%s\n%s", l.Nodes[i].Name, before[i], now)
		}
	}
}

// rotated waits until no rotation is under way and all nodes trust the same root alone.
func rotated(t *testing.T, l *lab.Lab, through int) time.Duration {
	t.Helper()
	return l.Eventually(40*time.Second, "the rotation is over", func() (bool, string) {
		busy, _, code := l.Docker(through, "info", "--format", "{{.Swarm.Cluster.RootRotationInProgress}}")
		if code != 0 || strings.TrimSpace(busy) != "false" {
			return false, "in progress: " + busy
		}
		root := strings.TrimSpace(l.Must(through, "swarm", "ca"))
		for _, n := range l.Nodes {
			has, e, _ := l.Docker(through, "node", "inspect", "--format", "{{.Description.TLSInfo.TrustRoot}}", l.Name+"-"+n.Name)
			if strings.TrimSpace(has) != root {
				return false, n.Name + " trusts " + has + e
			}
		}
		return true, ""
	})
}

// TestSecretStaysInMemory: the content of a secret is in the containers that use it, and on no disk, in no log and no answer.
func TestSecretStaysInMemory(t *testing.T) {
	l := lab.New(t, "e8", 2, 0)
	b := make([]byte, 16)
	_, _ = rand.Read(b)
	canary := "CANARY-" + hex.EncodeToString(b)
	file := filepath.Join(t.TempDir(), "s")
	if err := os.WriteFile(file, []byte(canary), 0o600); err != nil {
		t.Fatal(err)
	}
	l.Must(0, "secret", "create", "can", file)
	l.Must(0, "service", "create", "--name", "web", "--mode", "global", "--secret", "can", l.Image("v1"))
	running(t, l, 0, "web", 2, 20*time.Second)
	for i := range l.Nodes {
		id := strings.Fields(l.Must(i, "ps", "-q"))[0]
		for _, answer := range []string{l.Must(i, "inspect", id), l.Must(0, "service", "inspect", "web"), l.Must(0, "secret", "inspect", "can")} {
			if strings.Contains(answer, canary) {
				t.Errorf("an answer holds the secret: %s", answer)
			}
		}
		for _, found := range holds(t, filepath.Dir(l.Nodes[i].StateDir), canary) {
			t.Errorf("%s holds the secret", found)
		}
	}
	l.Must(0, "service", "rm", "web")
	l.Must(0, "secret", "rm", "can")
	killDaemon(t, l, 1)
	for _, n := range l.Nodes {
		for _, found := range holds(t, filepath.Dir(n.StateDir), canary) {
			t.Errorf("afterwards %s holds the secret", found)
		}
	}
}

// holds finds the files below a directory whose content has a text.
func holds(t *testing.T, dir, text string) (out []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return nil // gone meanwhile, or a socket
		}
		b, err := os.ReadFile(path)
		if err == nil && bytes.Contains(b, []byte(text)) {
			out = append(out, path)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}
