package image_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"skein/runtime/image"
)

// runChild is this test program in a process of its own: it pulls again and again until it is killed, or once onto a small disk.
func runChild(what string) int {
	root, ref := os.Getenv("IMAGE_TEST_ROOT"), os.Getenv("IMAGE_TEST_REF")
	ctx := context.Background()
	switch what {
	case "pull":
		s, err := image.Open(image.Config{Root: root})
		if err != nil {
			fmt.Println(err)
			return 1
		}
		fmt.Println("open")
		for i := 0; ; i++ {
			img, err := s.Pull(ctx, ref, image.PullOptions{})
			if err == nil {
				_, err = s.Prepare(ctx, fmt.Sprintf("c%d", i%3), img)
			}
			if err == nil {
				err = s.RemoveSnapshot(ctx, fmt.Sprintf("c%d", i%3))
			}
			if err == nil {
				_, _, err = s.Remove(ctx, ref, false)
			}
			if err != nil {
				fmt.Println(err)
				return 1
			}
		}
	case "small disk":
		return smallDisk(ctx, root, ref)
	}
	return 2
}

// smallDisk runs in a mount namespace of its own, so that its tmpfs ends with it.
func smallDisk(ctx context.Context, root, ref string) int {
	if err := errors.Join(unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""), unix.Mount("tmpfs", root, "tmpfs", 0, "size=4m")); err != nil {
		fmt.Println(err)
		return 1
	}
	s, err := image.Open(image.Config{Root: root})
	if err != nil {
		fmt.Println(err)
		return 1
	}
	_, err = s.Pull(ctx, ref, image.PullOptions{})
	fmt.Println(err)
	if !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), root) {
		return 1
	}
	// Nothing is left half done, and a smaller image fits.
	if err := s.Close(); err != nil {
		fmt.Println(err)
		return 1
	}
	if s, err = image.Open(image.Config{Root: root}); err != nil {
		fmt.Println(err)
		return 1
	}
	defer s.Close()
	if l, err := s.List(ctx); err != nil || len(l) != 0 {
		fmt.Println(l, err)
		return 1
	}
	if _, err := s.Pull(ctx, strings.Replace(ref, ":big", ":small", 1), image.PullOptions{}); err != nil {
		fmt.Println(err)
		return 1
	}
	return 0
}

func child(t *testing.T, what, root, ref string) *exec.Cmd {
	t.Helper()
	c := exec.Command("/proc/self/exe")
	c.Env = append(os.Environ(), "IMAGE_TEST_CHILD="+what, "IMAGE_TEST_ROOT="+root, "IMAGE_TEST_REF="+ref)
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return c
}

// pace slows a registry a little, so that a kill meets every phase of a pull.
type pace struct{ http.Handler }

func (p pace) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	p.Handler.ServeHTTP(slowWriter{w}, r)
}

type slowWriter struct{ http.ResponseWriter }

func (w slowWriter) Write(b []byte) (int, error) {
	time.Sleep(time.Millisecond) // the registry's speed, not a wait for anything
	return w.ResponseWriter.Write(b)
}

func TestReopenAfterKill(t *testing.T) {
	t.Parallel()
	reg, _ := newRegistry(t)
	threeLayers(t, "gzip zstd none").push(t, reg, "web:v1")
	srv := httptest.NewServer(pace{reg})
	t.Cleanup(srv.Close)
	ref := strings.TrimPrefix(srv.URL, "http://") + "/web:v1"
	root := filepath.Join(t.TempDir(), "images")
	for i := range 12 {
		c := child(t, "pull", root, ref)
		out, err := c.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewReader(out)
		if l, _ := lines.ReadString('\n'); l != "open\n" {
			t.Fatalf("round %d: child says %q", i, l)
		}
		time.Sleep(time.Duration(3+i*i*2) * time.Millisecond) // the moment of the kill is the test's input
		c.Process.Kill()
		rest, _ := io.ReadAll(lines)
		c.Wait()
		if len(rest) > 0 {
			t.Fatalf("round %d: child failed: %s", i, rest)
		}
		s, err := image.Open(image.Config{Root: root})
		if err != nil {
			t.Fatalf("round %d: %v", i, err)
		}
		checkClean(t, s, root)
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	noMountsBelow(t, root)
	s := openStore(t, root)
	img, err := s.Pull(testContext(t), ref, image.PullOptions{})
	if err != nil {
		t.Fatal(err)
	}
	ms, err := s.Prepare(testContext(t), "last", img)
	if err != nil {
		t.Fatal(err)
	}
	checkTree(t, ms[0], map[string]string{"etc/late": "late", "etc/gone": "-", "opq/new": "new"})
}

// checkClean compares what is on the disk with what the store says it has.
func checkClean(t *testing.T, s image.Store, root string) {
	t.Helper()
	ctx := testContext(t)
	imgs, err := s.List(ctx)
	if err != nil {
		t.Fatal(err)
	}
	keys, err := s.Snapshots(ctx)
	if err != nil {
		t.Fatal(err)
	}
	blobs, dirs := blobFiles(t, root), layerDirs(t, root)
	switch {
	case len(imgs) == 1 && (blobs != 5 || dirs != 3+len(keys)):
		t.Errorf("one image, %d containers: %d blobs, %d directories", len(keys), blobs, dirs)
	case len(imgs) == 0 && (blobs != 0 || (len(keys) == 0 && dirs != 0)):
		t.Errorf("no image, %d containers: %d blobs, %d directories", len(keys), blobs, dirs)
	}
	if es, _ := os.ReadDir(filepath.Join(root, "content", "ingest")); len(es) != 0 {
		t.Errorf("%d unfinished downloads are left", len(es))
	}
	for _, k := range keys {
		if err := s.RemoveSnapshot(ctx, k); err != nil {
			t.Error(err)
		}
	}
}

func noMountsBelow(t *testing.T, root string) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(b), root) {
		t.Errorf("a mount is left below %s", root)
	}
}

func TestDiskFull(t *testing.T) {
	reg, host := newRegistry(t)
	// Well compressible: the blob fits, the files do not.
	build(t, "gzip", tarOf(t, f("zeros", strings.Repeat("0", 16<<20)))).push(t, reg, "web:big")
	build(t, "gzip", tarOf(t, f("x", "1"))).push(t, reg, "web:small")
	c := child(t, "small disk", t.TempDir(), host+"/web:big")
	c.SysProcAttr.Cloneflags = syscall.CLONE_NEWNS
	if out, err := c.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}
