// Command inside is what the attack tests run in containers: a list of words, each an action with its arguments.
package main

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	a := os.Args[1:]
	for len(a) > 0 {
		f, ok := actions[a[0]]
		if !ok || len(a) <= f.args {
			fmt.Println("unknown action", a[0])
			os.Exit(99)
		}
		f.run(a[1 : 1+f.args])
		a = a[1+f.args:]
	}
}

type action struct {
	args int
	run  func(a []string)
}

var actions = map[string]action{
	"sleep": {0, func([]string) { time.Sleep(time.Hour) }},
	"exit":  {1, func(a []string) { os.Exit(number(a[0])) }},
	"echo":  {1, func(a []string) { fmt.Println(a[0]) }},
	"id":    {0, func([]string) { fmt.Println("id", os.Getuid(), os.Getgid()) }},
	"cat": {1, func(a []string) {
		b, err := os.ReadFile(a[0])
		fmt.Printf("cat %s %v %s\n", a[0], err, b)
	}},
	"mkdir":   {1, func(a []string) { fmt.Println("mkdir", os.MkdirAll(a[0], 0o777)) }},
	"symlink": {2, func(a []string) { fmt.Println("symlink", os.Symlink(a[0], a[1])) }},
	// swap exchanges a directory and a link, or whatever two names are, as fast as it can.
	"swap": {2, func(a []string) {
		fmt.Println("swapping")
		for {
			_ = unix.Renameat2(unix.AT_FDCWD, a[0], unix.AT_FDCWD, a[1], unix.RENAME_EXCHANGE)
		}
	}},
	// flood writes so many MiB.
	"flood": {1, func(a []string) {
		b := []byte(strings.Repeat("0123456789abcdefghijklmnopqrstu\n", 32))
		for range number(a[0]) << 10 {
			if _, err := os.Stdout.Write(b); err != nil {
				os.Exit(1)
			}
		}
	}},
	"line": {1, func(a []string) { // one line of so many MiB
		w := bufio.NewWriter(os.Stdout)
		s := strings.Repeat("x", 1<<20)
		for range number(a[0]) {
			w.WriteString(s)
		}
		w.WriteString("\n")
		w.Flush()
	}},
	"mount": {0, func([]string) {
		for range 10_000 {
			if err := unix.Mount("none", "/tmp", "tmpfs", 0, ""); err != nil {
				fmt.Println("mount", err)
				return
			}
		}
		fmt.Println("mounted")
	}},
	"forkbomb":  {0, func([]string) { forkBomb() }},
	"zombies":   {1, func(a []string) { zombies(number(a[0])) }},
	"openfiles": {0, func([]string) { openFiles() }},
	"inodes":    {1, func(a []string) { inodes(number(a[0])) }},
}

func number(s string) int {
	n, err := strconv.Atoi(s)
	if err != nil {
		os.Exit(98)
	}
	return n
}

// forkBomb starts copies of itself, which do the same, until the kernel refuses; then it goes on trying.
func forkBomb() {
	for i := 0; ; i++ {
		cmd := exec.Command("/inside", "forkbomb")
		if err := cmd.Start(); err != nil {
			if os.Getpid() == 1 && i > 0 {
				fmt.Println("refused", err)
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
}

// zombies leaves n children that nobody waits for.
func zombies(n int) {
	made := 0
	for range n {
		if _, err := syscall.ForkExec("/inside", []string{"inside", "exit", "0"}, nil); err == nil {
			made++
		}
	}
	fmt.Println("zombies", made)
	time.Sleep(time.Hour)
}

// openFiles opens files until it may not.
func openFiles() {
	n := 0
	for ; n < 2_000_000; n++ {
		if _, err := syscall.Open("/inside", syscall.O_RDONLY, 0); err != nil {
			for fd := 3; fd < 30; fd++ { // the runtime may need some
				syscall.Close(fd)
			}
			fmt.Println("files", n, err)
			break
		}
	}
	time.Sleep(time.Hour)
}

// inodes makes so many empty files.
func inodes(n int) {
	for i := range n {
		f, err := os.Create(fmt.Sprintf("/tmp/%d", i))
		if err != nil {
			fmt.Println("inodes", i, err)
			break
		}
		f.Close()
	}
	fmt.Println("inodes done")
	time.Sleep(time.Hour)
}
