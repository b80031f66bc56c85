package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"skein/cmd/dev"
	"skein/test/nemesis"
)

const (
	writeMin   = 150 * time.Millisecond // of writing before the power goes
	writeMax   = 1500 * time.Millisecond
	longEvery  = 25               // rounds between two that last
	longTime   = 65 * time.Second // until managers have taken a snapshot and cut their logs
	bootTime   = 30 * time.Second // to a leader that answers, on a busy machine
	freezeTime = 20 * time.Second
	copyTries  = 50 // a copy during which the kernel wrote to the disk is none
)

// lose is one loss of power.
func (w *world) lose(ctx context.Context, round int) error {
	d := writeMin + time.Duration(w.rand.Int64N(int64(writeMax-writeMin)))
	if round%longEvery == longEvery-1 {
		d += longTime
	}
	before := w.load.acks
	lctx, stop := context.WithTimeout(ctx, d)
	w.load.run(lctx)
	stop()
	// Requests that were cut off just now are still under way: the instant is in the middle of them.
	if err := w.freeze(true); err != nil {
		return err
	}
	var errs []error
	for _, n := range w.Managers() {
		errs = append(errs, copyDisk(w.DiskImage(n), n.StateDir))
	}
	if err := errors.Join(append(errs, w.freeze(false))...); err != nil {
		return err
	}
	for _, n := range w.Nodes {
		if err := w.Kill(n); err != nil {
			return err
		}
		if err := w.exchange(n); err != nil {
			return err
		}
	}
	begun := time.Now()
	if err := w.boot(ctx); err != nil {
		return err
	}
	took := time.Since(begun)
	w.boots = append(w.boots, took)
	if err := w.compare(ctx, fmt.Sprintf("round %d", round), w.Managers()); err != nil {
		return err
	}
	w.Say("round %d: %d writes acknowledged in %v, all %d managers booted and serve after %v", round, w.load.acks-before, d.Round(time.Millisecond), len(w.Managers()), took.Round(10*time.Millisecond))
	return w.load.settle(ctx, w.Client(w.Managers()[0]))
}

// freeze stops every process of the cluster, or lets them go on. What is in a system call ends it first.
func (w *world) freeze(frozen bool) error {
	file := filepath.Join("/sys/fs/cgroup/freezer/skein-dev", w.Name, "freezer.state")
	want := "THAWED"
	if frozen {
		want = "FROZEN"
	}
	if err := os.WriteFile(file, []byte(want), 0); err != nil {
		return fmt.Errorf("freeze the cluster: %w", err)
	}
	for begun := time.Now(); time.Since(begun) < freezeTime; time.Sleep(time.Millisecond) {
		b, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		if strings.TrimSpace(string(b)) == want {
			return nil
		}
	}
	return fmt.Errorf("the cluster was not %s within %v", want, freezeTime)
}

// lost is where the copy of an image lies.
func lost(image string) string { return image + ".lost" }

// copyDisk copies the image below a mounted disk at one instant: if the kernel wrote to the disk meanwhile, again.
func copyDisk(image, mount string) error {
	for range copyTries {
		before, err := written(mount)
		if err != nil {
			return err
		}
		if err := copySparse(lost(image), image); err != nil {
			return err
		}
		if after, err := written(mount); err != nil || after == before {
			return err
		}
	}
	return fmt.Errorf("disk on %s: the kernel wrote to it during each of %d copies", mount, copyTries)
}

// written tells how much was ever written to the device of a mounted disk, and what is under way.
func written(mount string) (string, error) {
	var st unix.Stat_t
	if err := unix.Stat(mount, &st); err != nil {
		return "", err
	}
	b, err := os.ReadFile(fmt.Sprintf("/sys/dev/block/%d:%d/stat", unix.Major(st.Dev), unix.Minor(st.Dev)))
	f := strings.Fields(string(b))
	if err != nil || len(f) < 9 {
		return "", fmt.Errorf("statistics of the disk on %s: %q, %v", mount, b, err)
	}
	return f[4] + " " + f[6] + " " + f[8], nil
}

// copySparse copies the parts of a file that were ever written.
func copySparse(dst, src string) error {
	in, err := os.Open(src)
	if err != nil {
		return err
	}
	defer in.Close()
	st, err := in.Stat()
	if err != nil {
		return err
	}
	out, err := os.OpenFile(dst, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer out.Close()
	if err := out.Truncate(st.Size()); err != nil {
		return err
	}
	for at := int64(0); ; {
		from, err := unix.Seek(int(in.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil
		}
		if err != nil {
			return err
		}
		if at, err = unix.Seek(int(in.Fd()), from, unix.SEEK_HOLE); err != nil {
			return err
		}
		if _, err := io.Copy(io.NewOffsetWriter(out, from), io.NewSectionReader(in, from, at-from)); err != nil {
			return err
		}
	}
}

// exchange puts a node's copied image in the place of its own.
func (w *world) exchange(n *dev.Node) error {
	if err := w.DetachDisk(n); err != nil {
		return err
	}
	if err := os.Rename(lost(w.DiskImage(n)), w.DiskImage(n)); err != nil {
		return err
	}
	return w.AttachDisk(n)
}

// boot starts all managers at once and returns when a leader answers at each.
func (w *world) boot(ctx context.Context) error {
	list := w.Managers()
	errs := make([]error, len(list))
	var wg sync.WaitGroup
	for i, n := range list {
		wg.Go(func() { errs[i] = w.Start(ctx, n) })
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("boot: %w", err)
	}
	_, err := w.Leader(ctx, bootTime)
	return err
}

// compare reads everything at the managers.
func (w *world) compare(ctx context.Context, what string, at []*dev.Node) error {
	for _, n := range at {
		var wrong []string
		err := errors.New("not asked")
		for begun := time.Now(); err != nil && time.Since(begun) < bootTime && ctx.Err() == nil; {
			if wrong, err = w.load.verify(ctx, w.Client(n)); err != nil {
				nemesis.Sleep(ctx, 50*time.Millisecond)
			}
		}
		if err != nil {
			return fmt.Errorf("read everything at %s: %w", n.Name, err)
		}
		for _, x := range wrong {
			w.violate("%s: at %s: %s", what, n.Name, x)
		}
	}
	return nil
}

func (w *world) summary() {
	for what, list := range map[string][]time.Duration{"boot": w.boots, "join after a wipe": w.joins} {
		if len(list) == 0 {
			continue
		}
		slices.Sort(list)
		w.Say("%s: n=%d median %v p99 %v max %v", what, len(list), list[len(list)/2].Round(time.Millisecond), list[len(list)*99/100].Round(time.Millisecond), list[len(list)-1].Round(time.Millisecond))
	}
	w.Say("%d writes acknowledged in all; %d promises broken (seed %d)", w.load.acks, len(w.broken), w.opts.seed)
}
