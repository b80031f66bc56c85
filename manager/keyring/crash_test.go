package keyring_test

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"skein/manager/keyring"
)

// A crash at each step of locking, of another unlock key, and of unlocking leaves a keyring that one of the two keys opens, and that
// decrypts all that was ever encrypted; nothing of the attempt stays on disk.
func TestCrashWhileLocking(t *testing.T) {
	keys := [][]byte{nil, keyring.NewUnlockKey(), keyring.NewUnlockKey(), nil}
	dir := t.TempDir()
	k, err := keyring.Create(dir)
	if err != nil {
		t.Fatal(err)
	}
	sealed := [][]byte{k.Seal([]byte("x"), nil)}
	for i, key := range keys[1:] {
		before := read(t, keyring.Path(dir))
		if err := k.Lock(key); err != nil {
			t.Fatal(err)
		}
		after := read(t, keyring.Path(dir))
		for name, disk := range map[string]struct{ file, temp []byte }{
			"nothing written": {before, []byte{}}, "half written": {before, after[:len(after)/2]}, "written": {before, after}, "renamed": {after, nil}, "renamed, temp of another": {after, before},
		} {
			crashed := t.TempDir()
			write(t, keyring.Path(crashed), disk.file)
			temp := filepath.Join(crashed, "."+filepath.Base(keyring.Path(crashed))+"-123")
			if disk.temp != nil {
				write(t, temp, disk.temp)
			}
			fits, useless := keys[i], keys[i+1]
			if bytes.Equal(disk.file, after) {
				fits, useless = useless, fits
			}
			opened, err := unlock(crashed, fits)
			if err != nil {
				t.Fatalf("step %d, %s: %v", i, name, err)
			}
			for _, s := range sealed {
				if plain, err := opened.Unseal(s, nil); err != nil || string(plain) != "x" {
					t.Errorf("step %d, %s: %v", i, name, err)
				}
			}
			if _, err := unlock(crashed, useless); err == nil && len(useless) > 0 && len(fits) > 0 {
				t.Errorf("step %d, %s: the other key opens it, too", i, name)
			}
			if _, err := os.Lstat(temp); err == nil {
				t.Errorf("step %d, %s: what the crash left is still there", i, name)
			}
		}
		sealed = append(sealed, k.Seal([]byte("x"), nil))
	}
}

func unlock(dir string, key []byte) (*keyring.Keyring, error) {
	if len(key) == 0 {
		return keyring.Open(dir)
	}
	return keyring.Unlock(dir, keyring.FormatUnlockKey(key))
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func write(t *testing.T, path string, b []byte) {
	t.Helper()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}
