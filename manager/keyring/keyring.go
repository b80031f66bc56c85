// Package keyring holds the keys that encrypt what a manager keeps on disk, and locks them.
//
// The data keys are random, belong to one manager and lie in one file. With an unlock key (autolock) that file is itself encrypted: whoever has
// the disk alone has nothing, and a restarted manager waits until a human brings the key. Without one the file is plain, as docker's is.
// Each change of the unlock key makes a new data key, so that a plain copy of the file that somebody took earlier does not open what is
// written later; older keys are kept for what they encrypted. AES-256-GCM throughout, with random nonces.
//
// It knows neither the log nor certificates. Used by manager, manager/consensus (through an interface) and cmd/daemon.
package keyring

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/errdefs"

	"skein/manager/api"
)

const (
	fileName   = "keys.json"
	keyBytes   = 32
	maxFile    = 64 << 10
	maxKeys    = 1000 // changes of the unlock key in a manager's life
	fileFormat = 1
	fileBound  = "skein data keys" // what the sealed keys are bound to
)

// Overhead is how many bytes Seal adds.
const Overhead = 4 + 12 + 16

// ErrLocked says that the keys are encrypted and the unlock key is needed.
var ErrLocked = errors.New("the keys of this manager's data are locked")

// Keyring is a manager's data keys. Safe for concurrent use.
type Keyring struct {
	path string

	mu     sync.RWMutex
	keys   []cipher.AEAD
	raw    [][]byte
	unlock []byte // nil: not locked
}

// file is what is on disk.
type file struct {
	Format int
	Locked bool
	Keys   []byte // JSON of the keys; encrypted with the unlock key if Locked
}

// Path is where the keys of the manager with this state directory lie.
func Path(dir string) string { return filepath.Join(dir, fileName) }

// Exists reports whether dir holds a keyring, locked or not.
func Exists(dir string) bool {
	_, err := os.Lstat(Path(dir))
	return err == nil
}

// Create makes a keyring of one new key in dir, not locked. There must be none.
func Create(dir string) (*Keyring, error) {
	if Exists(dir) {
		return nil, api.Errorf(errdefs.ErrAlreadyExists, "make data keys: %s exists", Path(dir))
	}
	k := &Keyring{path: Path(dir)}
	if err := k.save(append(k.raw, random()), nil); err != nil {
		return nil, fmt.Errorf("make data keys: %w", err)
	}
	return k, nil
}

// Open reads the keyring in dir. A locked one gives ErrLocked: use Unlock.
func Open(dir string) (*Keyring, error) { return open(dir, nil) }

// Unlock reads a locked keyring. A key that does not fit is an error of kind unauthenticated.
func Unlock(dir, unlockKey string) (*Keyring, error) {
	key, err := ParseUnlockKey(unlockKey)
	if err != nil {
		return nil, err
	}
	return open(dir, key)
}

func open(dir string, unlock []byte) (*Keyring, error) {
	k := &Keyring{path: Path(dir)}
	if err := sweep(dir); err != nil {
		return nil, fmt.Errorf("read data keys %s: %w", k.path, err)
	}
	f, err := read(k.path)
	if err != nil {
		return nil, fmt.Errorf("read data keys %s: %w", k.path, err)
	}
	text := f.Keys
	switch {
	case f.Locked && unlock == nil:
		return nil, ErrLocked
	case f.Locked:
		aead, err := newAEAD(unlock)
		if err != nil {
			return nil, err
		}
		if text, err = aead.Open(nil, nil, f.Keys, []byte(fileBound)); err != nil {
			return nil, api.Errorf(errdefs.ErrUnauthenticated, "swarm could not be unlocked: invalid key provided")
		}
		k.unlock = unlock
	}
	var raw [][]byte
	if err := json.Unmarshal(text, &raw); err != nil {
		return nil, fmt.Errorf("read data keys %s: the file is damaged: %w", k.path, err)
	}
	if err := k.use(raw); err != nil {
		return nil, fmt.Errorf("read data keys %s: the file is damaged: %w", k.path, err)
	}
	return k, nil
}

func read(path string) (*file, error) {
	r, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	b, err := io.ReadAll(io.LimitReader(r, maxFile))
	if err != nil {
		return nil, err
	}
	var f file
	if err := json.Unmarshal(b, &f); err != nil {
		return nil, fmt.Errorf("the file is damaged: %w", err)
	}
	if f.Format != fileFormat {
		return nil, fmt.Errorf("format %d is not known: it was written by a newer version of skein", f.Format)
	}
	return &f, nil
}

// use takes keys over. It is called with mu held, or before anybody else has the keyring.
func (k *Keyring) use(raw [][]byte) error {
	if len(raw) == 0 || len(raw) > maxKeys {
		return fmt.Errorf("%d keys, want 1 to %d", len(raw), maxKeys)
	}
	var keys []cipher.AEAD
	for _, r := range raw {
		a, err := newAEAD(r)
		if err != nil {
			return err
		}
		keys = append(keys, a)
	}
	k.raw, k.keys = raw, keys
	return nil
}

// Lock encrypts the keys with an unlock key from now on, or keeps them plain with an empty one, and makes a new data key if that is a
// change. It returns after the file is durable; on an error everything is as before.
func (k *Keyring) Lock(unlock []byte) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if slices.Equal(unlock, k.unlock) {
		return nil
	}
	raw := slices.Clone(k.raw)
	if len(unlock) > 0 && len(raw) < maxKeys {
		raw = append(raw, random())
	}
	if err := k.save(raw, unlock); err != nil {
		return fmt.Errorf("lock data keys: %w", err)
	}
	return nil
}

// Locked reports whether the keys on disk are encrypted.
func (k *Keyring) Locked() bool {
	k.mu.RLock()
	defer k.mu.RUnlock()
	return len(k.unlock) > 0
}

func (k *Keyring) save(raw [][]byte, unlock []byte) error {
	text, err := json.Marshal(raw)
	if err != nil {
		return err
	}
	f := file{Format: fileFormat, Keys: text}
	if len(unlock) > 0 {
		aead, err := newAEAD(unlock)
		if err != nil {
			return err
		}
		f.Locked, f.Keys = true, aead.Seal(nil, nil, text, []byte(fileBound))
	}
	b, err := json.Marshal(f)
	if err != nil {
		return err
	}
	if len(b) >= maxFile {
		return fmt.Errorf("%s: %d bytes are more than it may have", k.path, len(b))
	}
	if err := replace(k.path, b); err != nil {
		return err
	}
	k.unlock = slices.Clone(unlock)
	return k.use(raw)
}

// tempPrefix begins the names of files that replace has not finished.
const tempPrefix = "." + fileName + "-"

// sweep removes what a crash left of replace: it may hold the keys in another state than the file, even in plain.
func sweep(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), tempPrefix) {
			if err := os.Remove(filepath.Join(dir, e.Name())); err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
		}
	}
	return nil
}

// replace writes a file durably: after a crash there is the old content or the new.
func replace(path string, b []byte) (err error) {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, tempPrefix+"*") // mode 0600
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(f.Name())
		}
	}()
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err = os.Rename(f.Name(), path); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// Seal encrypts plain with the newest key, bound to bound: Unseal wants the same. The result is Overhead bytes longer.
func (k *Keyring) Seal(plain, bound []byte) []byte {
	k.mu.RLock()
	defer k.mu.RUnlock()
	newest := len(k.keys) - 1
	out := binary.BigEndian.AppendUint32(make([]byte, 0, len(plain)+Overhead), uint32(newest))
	return k.keys[newest].Seal(out, nil, plain, bound)
}

// Unseal decrypts what Seal made.
func (k *Keyring) Unseal(sealed, bound []byte) ([]byte, error) {
	if len(sealed) < Overhead {
		return nil, errors.New("too short to be encrypted: it is damaged")
	}
	k.mu.RLock()
	defer k.mu.RUnlock()
	n := binary.BigEndian.Uint32(sealed)
	if n >= uint32(len(k.keys)) {
		return nil, fmt.Errorf("encrypted with key %d of %d: it is damaged, or %s is of an earlier time", n, len(k.keys), k.path)
	}
	plain, err := k.keys[n].Open(nil, nil, sealed[4:], bound)
	if err != nil {
		return nil, errors.New("does not decrypt: it is damaged, or of another manager")
	}
	return plain, nil
}

func newAEAD(key []byte) (cipher.AEAD, error) {
	if len(key) != keyBytes {
		return nil, fmt.Errorf("a key has %d bytes, not %d", keyBytes, len(key))
	}
	b, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCMWithRandomNonce(b)
}

func random() []byte {
	b := make([]byte, keyBytes)
	rand.Read(b) // never fails: crypto/rand
	return b
}

// unlockPrefix is docker's.
const unlockPrefix = "SWMKEY-1-"

// NewUnlockKey makes an unlock key.
func NewUnlockKey() []byte { return random() }

// FormatUnlockKey is the key as humans keep it.
func FormatUnlockKey(key []byte) string {
	if len(key) == 0 {
		return ""
	}
	return unlockPrefix + base64.RawStdEncoding.EncodeToString(key)
}

// ParseUnlockKey reads what FormatUnlockKey wrote.
func ParseUnlockKey(s string) ([]byte, error) {
	text, ok := strings.CutPrefix(strings.TrimSpace(s), unlockPrefix)
	key, err := base64.RawStdEncoding.DecodeString(text)
	if !ok || err != nil || len(key) != keyBytes {
		return nil, api.Errorf(errdefs.ErrInvalidArgument, "the unlock key is malformed: want %s followed by 43 characters, as \"docker swarm unlock-key\" shows it", unlockPrefix)
	}
	return key, nil
}
