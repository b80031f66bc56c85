package main

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
)

// moduleDirs are the parts of the kernel's modules that the guest gets; they are loaded by the kernel when something asks for them.
func moduleDirs() []string {
	return []string{"net", "fs/overlayfs", "fs/nls", "drivers/net/vxlan", "drivers/net/veth.ko", "drivers/net/dummy.ko", "drivers/net/tun.ko", "lib", "crypto", "arch/x86/crypto"}
}

// build makes the initramfs in file.
func build(ctx context.Context, c config, tmp, file, release string) error {
	root := filepath.Join(tmp, "root")
	for _, d := range []string{"bin", "sbin", "proc", "sys", "dev", "tmp", "run", "etc", "root", "usr/bin", "usr/sbin", "var/lib", "unit"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			return err
		}
	}
	if err := compile(ctx, filepath.Join(root, "init"), "skein/test/vm"); err != nil {
		return err
	}
	if c.skein == "" {
		c.skein = filepath.Join(tmp, "skein")
		if err := compile(ctx, c.skein, "skein/cmd/skein"); err != nil {
			return err
		}
	}
	for _, pair := range [][2]string{{c.skein, "bin/skein"}, {c.busybox, "bin/busybox"}} {
		if err := copyFile(filepath.Join(root, pair[1]), pair[0], 0o755); err != nil {
			return err
		}
	}
	if err := modules(c, root, release); err != nil {
		return err
	}
	if err := units(ctx, c, root); err != nil {
		return err
	}
	archive, err := imageArchive(c.busybox)
	if err != nil {
		return err
	}
	for name, content := range map[string]string{"bb.tar": string(archive), "etc/passwd": "root:x:0:0::/root:/bin/sh\n", "etc/group": "root:x:0:\n", "etc/hosts": "127.0.0.1 localhost\n",
		"etc/vm-run": c.run, "etc/vm-unit": c.unitRun} {
		if err := os.WriteFile(filepath.Join(root, name), []byte(content), 0o644); err != nil {
			return err
		}
	}
	return cpio(root, file)
}

func compile(ctx context.Context, out, pkg string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-o", out, pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if b, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go build %s: %w\n%s", pkg, err, b)
	}
	return nil
}

// units compiles the tests of packages, with their testdata where the tests look for it.
func units(ctx context.Context, c config, root string) error {
	if c.unit == "" {
		return nil
	}
	for _, pkg := range strings.Split(c.unit, ",") {
		dir := filepath.Join(root, "unit", path.Clean(pkg))
		cmd := exec.CommandContext(ctx, "go", "test", "-c", "-o", filepath.Join(dir, "unit.test"), pkg)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if b, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("go test -c %s: %w\n%s", pkg, err, b)
		}
		if _, err := os.Stat(filepath.Join(pkg, "testdata")); err == nil {
			if err := os.CopyFS(filepath.Join(dir, "testdata"), os.DirFS(filepath.Join(pkg, "testdata"))); err != nil {
				return err
			}
		}
	}
	return nil
}

// modules copies kernel modules and lists what they depend on.
func modules(c config, root, release string) error {
	from := filepath.Join(c.root, "lib/modules", release)
	to := filepath.Join(root, "lib/modules", release)
	for _, d := range moduleDirs() {
		src := filepath.Join(from, "kernel", d)
		err := filepath.WalkDir(src, func(p string, e fs.DirEntry, err error) error {
			if err != nil || e.IsDir() {
				return err
			}
			return copyFile(filepath.Join(to, strings.TrimPrefix(p, from)), p, 0o644)
		})
		if err != nil {
			return err
		}
	}
	for _, f := range []string{"modules.builtin", "modules.builtin.modinfo", "modules.order"} {
		if err := copyFile(filepath.Join(to, f), filepath.Join(from, f), 0o644); err != nil {
			return err
		}
	}
	if b, err := exec.Command(c.busybox, "depmod", "-b", root, release).CombinedOutput(); err != nil {
		return fmt.Errorf("depmod: %w\n%s", err, b)
	}
	return nil
}

func copyFile(to, from string, mode os.FileMode) error {
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	return os.WriteFile(to, b, mode)
}

// cpio writes the tree below root in the format that the kernel unpacks ("newc").
func cpio(root, file string) error {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	defer f.Close()
	ino := 0
	entry := func(name string, mode uint32, data []byte) error {
		ino++
		var b bytes.Buffer
		fmt.Fprintf(&b, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x", ino, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name)+1, 0)
		b.WriteString(name + "\x00")
		b.Write(make([]byte, -b.Len()&3))
		b.Write(data)
		b.Write(make([]byte, -len(data)&3))
		_, err := f.Write(b.Bytes())
		return err
	}
	err = filepath.WalkDir(root, func(p string, e fs.DirEntry, err error) error {
		if err != nil || p == root {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		name := strings.TrimPrefix(p, root+"/")
		if e.IsDir() {
			return entry(name, 0o040755, nil)
		}
		b, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		return entry(name, 0o100000|uint32(info.Mode().Perm()), b)
	})
	if err != nil {
		return err
	}
	if err := entry("TRAILER!!!", 0, nil); err != nil {
		return err
	}
	return f.Sync()
}

// imageArchive is an archive as "docker save" writes it: busybox with a link for each applet.
func imageArchive(busybox string) ([]byte, error) {
	bin, err := os.ReadFile(busybox)
	if err != nil {
		return nil, err
	}
	list, err := exec.Command(busybox, "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("list busybox applets: %w", err)
	}
	var layer, out bytes.Buffer
	lw, ow := tar.NewWriter(&layer), tar.NewWriter(&out)
	add := func(w *tar.Writer, h tar.Header, data []byte) {
		h.Size = int64(len(data))
		err1 := w.WriteHeader(&h)
		_, err2 := w.Write(data)
		if err == nil && (err1 != nil || err2 != nil) {
			err = fmt.Errorf("%v %v", err1, err2)
		}
	}
	for _, d := range []string{"bin/", "etc/", "root/", "tmp/"} {
		add(lw, tar.Header{Name: d, Typeflag: tar.TypeDir, Mode: 0o755}, nil)
	}
	add(lw, tar.Header{Name: "bin/busybox", Mode: 0o755}, bin)
	add(lw, tar.Header{Name: "etc/passwd", Mode: 0o644}, []byte("root:x:0:0::/root:/bin/sh\n"))
	for _, a := range strings.Fields(string(list)) {
		if a != "busybox" {
			add(lw, tar.Header{Name: "bin/" + path.Base(a), Typeflag: tar.TypeSymlink, Linkname: "busybox", Mode: 0o777}, nil)
		}
	}
	lw.Close()
	cfg, _ := json.Marshal(map[string]any{"architecture": "amd64", "os": "linux", "config": map[string]any{"Env": []string{"PATH=/bin"}, "Cmd": []string{"sh"}},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{fmt.Sprintf("sha256:%x", sha256.Sum256(layer.Bytes()))}}})
	name := fmt.Sprintf("%x.json", sha256.Sum256(cfg))
	manifest, _ := json.Marshal([]map[string]any{{"Config": name, "RepoTags": []string{"bb:latest"}, "Layers": []string{"l/layer.tar"}}})
	add(ow, tar.Header{Name: name, Mode: 0o644}, cfg)
	add(ow, tar.Header{Name: "l/layer.tar", Mode: 0o644}, layer.Bytes())
	add(ow, tar.Header{Name: "manifest.json", Mode: 0o644}, manifest)
	ow.Close()
	return out.Bytes(), err
}
