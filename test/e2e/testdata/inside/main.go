// Command inside is what the tests of processes run in containers: each argument is a step.
package main

import (
	"fmt"
	"io"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"
)

func main() {
	for a := os.Args[1:]; len(a) > 0; {
		step := a[0]
		if a = a[1:]; len(a) > 0 && strings.HasSuffix(step, "=") {
			step, a = step+a[0], a[1:]
		}
		name, value, _ := strings.Cut(step, "=")
		run(name, value)
	}
}

func run(name, value string) {
	switch name {
	case "exit":
		n, _ := strconv.Atoi(value)
		os.Exit(n)
	case "say":
		fmt.Println(value)
	case "env":
		fmt.Println(value + "=" + os.Getenv(value))
	case "who":
		wd, _ := os.Getwd()
		fmt.Printf("uid=%d gid=%d cwd=%s pid=%d\n", os.Getuid(), os.Getgid(), wd, os.Getpid())
	case "first": // the first process's name
		b, _ := os.ReadFile("/proc/1/comm")
		fmt.Print("first=", string(b))
	case "cat":
		_, _ = io.Copy(os.Stdout, os.Stdin)
	case "read": // one byte
		_, _ = os.Stdin.Read(make([]byte, 1))
	case "write":
		if err := os.WriteFile(value, []byte("text\n"), 0o644); err != nil {
			fmt.Println(err)
		}
	case "remove":
		fmt.Println("remove", os.Remove(value))
	case "ls":
		list, err := os.ReadDir(value)
		for _, e := range list {
			fmt.Print(e.Name(), " ")
		}
		fmt.Println(err)
	case "eat": // MiB
		n, _ := strconv.Atoi(value)
		b := make([]byte, n<<20)
		for i := 0; i < len(b); i += 4096 {
			b[i] = 1
		}
	case "die": // by a signal
		n, _ := strconv.Atoi(value)
		_ = syscall.Kill(os.Getpid(), syscall.Signal(n))
		time.Sleep(time.Minute)
	case "trap": // exits with 40 + the signal's number
		c := make(chan os.Signal, 1)
		signal.Notify(c, syscall.SIGTERM, syscall.SIGUSR1, syscall.SIGHUP)
		fmt.Println("ready")
		os.Exit(40 + int((<-c).(syscall.Signal)))
	case "sleep":
		d, _ := time.ParseDuration(value)
		time.Sleep(d)
	}
}
