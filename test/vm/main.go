// Command vm boots a Linux kernel under QEMU and runs the node inside: on pure cgroup v2 and on a kernel that is not the host's.
//
//	apt-get download qemu-system-x86 qemu-system-data seabios ... linux-image-6.1.0-NN-cloud-amd64   # and what qemu depends on
//	for f in *.deb; do dpkg -x $f DIR; done
//	go run ./test/vm --root DIR [--run REGEXP] [--unit ./runtime/cgroup,...]
//
// Nothing is installed: qemu, its libraries, the kernel and its modules are used from DIR; a busybox that is linked statically comes from
// the host. An initramfs is made of this program (init), the skein binary, busybox and the modules; the checks of checks.go run inside
// and print PASS, FAIL or SKIP lines, which decide the exit code. No network, no disk: everything of the guest is in its memory. With --unit the test binaries of packages run in the guest too. The same program is init, the checks and the host side.
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

type config struct {
	root, busybox, skein, run, unit, unitRun, accel string
	memory                                          int
	timeout                                         time.Duration
	verbose                                         bool
}

func main() {
	if os.Getpid() == 1 {
		guestInit()
		return
	}
	if len(os.Args) > 1 && os.Args[1] == "checks" {
		os.Exit(guestChecks())
	}
	var c config
	flag.StringVar(&c.root, "root", os.Getenv("SKEIN_VM_ROOT"), "directory with the extracted packages of qemu and of the kernel")
	flag.StringVar(&c.busybox, "busybox", "/usr/bin/busybox", "busybox, linked statically")
	flag.StringVar(&c.skein, "skein", "", "skein binary (default: built now)")
	flag.StringVar(&c.run, "run", "", "run only the checks that match")
	flag.StringVar(&c.unit, "unit", "", "comma separated packages whose tests run in the guest too")
	flag.StringVar(&c.unitRun, "unit-run", "", "run only their tests that match")
	flag.StringVar(&c.accel, "accel", "tcg", "tcg, which works everywhere, or kvm")
	flag.IntVar(&c.memory, "memory", 3072, "MiB of memory of the guest")
	flag.DurationVar(&c.timeout, "timeout", 8*time.Minute, "time after which the guest is ended")
	flag.BoolVar(&c.verbose, "v", false, "show all of the guest's console")
	flag.Parse()
	ctx, cancel := context.WithTimeout(context.Background(), c.timeout)
	defer cancel()
	if err := host(ctx, c, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "vm:", err)
		os.Exit(1)
	}
}

// host builds the guest, boots it and passes on what it says.
func host(ctx context.Context, c config, out io.Writer) error {
	if c.root == "" {
		return errors.New("--root: name the directory into which the packages of qemu and a kernel were extracted")
	}
	kernels, err := filepath.Glob(filepath.Join(c.root, "boot/vmlinuz-*"))
	if err != nil || len(kernels) != 1 {
		return fmt.Errorf("want one %s/boot/vmlinuz-*, found %d", c.root, len(kernels))
	}
	tmp, err := os.MkdirTemp("", "skein-vm-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	initrd := filepath.Join(tmp, "initramfs")
	if err := build(ctx, c, tmp, initrd, strings.TrimPrefix(filepath.Base(kernels[0]), "vmlinuz-")); err != nil {
		return fmt.Errorf("build the guest: %w", err)
	}
	return boot(ctx, c, kernels[0], initrd, out)
}

func qemu(ctx context.Context, c config, kernel, initrd string) *exec.Cmd {
	lib := "usr/lib/x86_64-linux-gnu"
	args := []string{"-M", "pc", "-cpu", "max", "-smp", "2", "-m", fmt.Sprint(c.memory), "-nographic", "-no-reboot", "-nodefaults", "-serial", "stdio", "-net", "none",
		"-kernel", kernel, "-initrd", initrd, "-append", "console=ttyS0 quiet loglevel=4 panic=-1 random.trust_cpu=on"}
	for _, d := range []string{"usr/share/qemu", "usr/share/seabios"} {
		args = append(args, "-L", filepath.Join(c.root, d))
	}
	cmd := exec.CommandContext(ctx, filepath.Join(c.root, "usr/bin/qemu-system-x86_64"), append(args, "-accel", c.accel)...)
	cmd.Env = append(os.Environ(), "LD_LIBRARY_PATH="+filepath.Join(c.root, lib)+":"+filepath.Join(c.root, "lib/x86_64-linux-gnu"))
	cmd.Stderr = os.Stderr
	return cmd
}

var verdict = regexp.MustCompile(`^(PASS|FAIL|SKIP|DONE|INFO) `)

func boot(ctx context.Context, c config, kernel, initrd string, out io.Writer) error {
	cmd := qemu(ctx, c, kernel, initrd)
	console, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	failed, done := 0, false
	last := []string{}
	sc := bufio.NewScanner(console)
	sc.Buffer(make([]byte, 64<<10), 1<<20)
	for sc.Scan() {
		line := strings.TrimRight(sc.Text(), "\r")
		known := verdict.MatchString(line)
		switch {
		case strings.HasPrefix(line, "FAIL "):
			failed++
		case strings.HasPrefix(line, "DONE "):
			done = true
		}
		if known || c.verbose || strings.HasPrefix(line, "    ") {
			fmt.Fprintln(out, line)
		}
		if last = append(last, line); len(last) > 30 {
			last = last[1:]
		}
	}
	if err := errors.Join(sc.Err(), cmd.Wait()); err != nil || !done {
		return fmt.Errorf("the guest did not come to its end (%v); its last words:\n%s", err, strings.Join(last, "\n"))
	}
	if failed > 0 {
		return fmt.Errorf("%d checks failed", failed)
	}
	return nil
}
