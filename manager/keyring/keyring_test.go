package keyring

import (
	"bytes"
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func must[T any](t *testing.T) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func TestLockAndUnlock(t *testing.T) {
	dir := t.TempDir()
	k := must[*Keyring](t)(Create(dir))
	if _, err := Create(dir); !errdefs.IsAlreadyExists(err) {
		t.Errorf("a second one: %v", err)
	}
	before := k.Seal([]byte("before"), []byte("entry 1"))
	key := NewUnlockKey()
	if err := k.Lock(key); err != nil {
		t.Fatal(err)
	}
	after := k.Seal([]byte("after"), []byte("entry 2"))
	if bytes.Equal(before[:4], after[:4]) {
		t.Error("locking made no new data key")
	}
	onDisk := must[[]byte](t)(os.ReadFile(Path(dir)))
	for _, raw := range k.raw {
		if bytes.Contains(onDisk, raw) {
			t.Error("a data key is on the disk in plain")
		}
	}
	if _, err := Open(dir); !errors.Is(err, ErrLocked) {
		t.Errorf("open of a locked one: %v", err)
	}
	if _, err := Unlock(dir, FormatUnlockKey(NewUnlockKey())); !errdefs.IsUnauthorized(err) || !strings.Contains(err.Error(), "invalid key provided") {
		t.Errorf("a wrong key: %v", err)
	}
	for _, bad := range []string{"", "SWMKEY-1-", "SWMKEY-2-" + strings.Repeat("A", 43), "SWMKEY-1-" + strings.Repeat("!", 43)} {
		if _, err := Unlock(dir, bad); !errdefs.IsInvalidArgument(err) {
			t.Errorf("key %q: %v", bad, err)
		}
	}
	k = must[*Keyring](t)(Unlock(dir, " "+FormatUnlockKey(key)+"\n"))
	check := func(k *Keyring) {
		t.Helper()
		if b, err := k.Unseal(before, []byte("entry 1")); err != nil || string(b) != "before" {
			t.Errorf("sealed before the lock: %q %v", b, err)
		}
		if b, err := k.Unseal(after, []byte("entry 2")); err != nil || string(b) != "after" {
			t.Errorf("sealed after it: %q %v", b, err)
		}
	}
	check(k)
	for name, bad := range map[string][]byte{"another place": after, "cut": after[:Overhead-1], "no such key": append([]byte{0, 0, 0, 9}, after[4:]...)} {
		bound := "entry 2"
		if name == "another place" {
			bound = "entry 3"
		}
		if _, err := k.Unseal(bad, []byte(bound)); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if err := k.Lock(nil); err != nil {
		t.Fatal(err)
	}
	check(must[*Keyring](t)(Open(dir)))
}

// A failed write leaves file and keys as they were.
func TestLockThatFails(t *testing.T) {
	dir := t.TempDir()
	k := must[*Keyring](t)(Create(dir))
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if err := k.Lock(NewUnlockKey()); err == nil || k.Locked() || len(k.raw) != 1 {
		t.Errorf("lock without a directory: %v, locked %v, %d keys", err, k.Locked(), len(k.raw))
	}
}

func FuzzOpen(f *testing.F) {
	f.Add([]byte(`{"Format":1,"Keys":"W10="}`))
	f.Add([]byte(`{"Format":1,"Locked":true,"Keys":"AAAA"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		dir := t.TempDir()
		if err := os.WriteFile(Path(dir), b, 0o600); err != nil {
			t.Fatal(err)
		}
		if k, err := Open(dir); err == nil {
			if got, err := k.Unseal(k.Seal([]byte("x"), nil), nil); err != nil || string(got) != "x" {
				t.Errorf("%q %v", got, err)
			}
		}
		_, _ = Unlock(dir, FormatUnlockKey(make([]byte, keyBytes)))
	})
}
