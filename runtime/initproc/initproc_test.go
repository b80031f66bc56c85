package initproc

import (
	"bytes"
	"debug/elf"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// TestFile reads the program back as the kernel would, and tries to change it.
func TestFile(t *testing.T) {
	fd, err := Open()
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "init")
	defer f.Close()
	e, err := elf.NewFile(f)
	if err != nil {
		t.Fatal(err)
	}
	if e.Type != elf.ET_EXEC || len(e.Progs) != 2 || e.Progs[0].Flags != elf.PF_R|elf.PF_X || e.Progs[1].Flags != elf.PF_R|elf.PF_W {
		t.Errorf("header %+v, segments %+v, want one that is executable and a stack that is not", e.FileHeader, e.Progs)
	}
	image, err := build()
	if err != nil {
		t.Fatal(err)
	}
	if len(image) > 1024 || e.Progs[0].Filesz != uint64(len(image)) {
		t.Errorf("%d bytes, the segment %d", len(image), e.Progs[0].Filesz)
	}
	if _, err := unix.Pwrite(fd, []byte{0}, 0); err == nil {
		t.Error("the file can be written")
	}
	if err := unix.Ftruncate(fd, 0); err == nil {
		t.Error("the file can be cut")
	}
	got := make([]byte, len(image))
	if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, image) {
		t.Errorf("read back: %v", err)
	}
}
