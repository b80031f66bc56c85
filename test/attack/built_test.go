package attack

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
)

var (
	builtDir atomic.Value // of the programs, once there is one

	buildInside = sync.OnceValues(func() (string, error) {
		dir, err := os.MkdirTemp("", "skein-attack-")
		if err != nil {
			return "", err
		}
		builtDir.Store(dir)
		out := filepath.Join(dir, "inside")
		cmd := exec.Command("go", "build", "-o", out, "./testdata/inside")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if msg, err := cmd.CombinedOutput(); err != nil {
			return "", fmt.Errorf("build the program for containers: %w\n%s", err, msg)
		}
		return out, nil
	})
)

// inside is the path of the static program that tests run in containers (testdata/inside).
func inside(t testing.TB) string {
	t.Helper()
	p, err := buildInside()
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func removeBuilt() {
	if d, ok := builtDir.Load().(string); ok {
		os.RemoveAll(d)
	}
}
