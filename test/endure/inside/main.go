// Command inside is what endurance runs in containers: it tells its name with every line and with its exit code, so that every line and
// every code can be accounted for.
//
//	inside lines NAME COUNT PAUSE CODE   prints "NAME begin", COUNT numbered lines with a pause between them, ends with CODE;
//	                                     COUNT 0: until SIGTERM, then "NAME end N"
//	inside idle                          sleeps until SIGTERM
//	inside touch                         writes a byte to every page of 64 MiB
package main

import (
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"
)

// block is touched by "touch"; it costs nothing before.
var block [64 << 20]byte

func main() {
	if len(os.Args) < 2 {
		os.Exit(2)
	}
	switch os.Args[1] {
	case "idle":
		<-terminated()
	case "touch":
		for i := 0; i < len(block); i += 4096 {
			block[i] = 1
		}
	case "lines":
		lines(os.Args[2:])
	default:
		os.Exit(2)
	}
}

func terminated() <-chan os.Signal {
	ch := make(chan os.Signal, 1)
	signal.Notify(ch, syscall.SIGTERM)
	return ch
}

func lines(a []string) {
	if len(a) != 4 {
		os.Exit(2)
	}
	count, err := strconv.Atoi(a[1])
	pause, perr := time.ParseDuration(a[2])
	code, cerr := strconv.Atoi(a[3])
	if err != nil || perr != nil || cerr != nil {
		os.Exit(2)
	}
	end := terminated()
	fmt.Printf("%s begin\n", a[0])
	for i := 0; count == 0 || i < count; i++ {
		fmt.Printf("%s %d\n", a[0], i)
		select {
		case <-time.After(pause):
		case <-end:
			fmt.Printf("%s end %d\n", a[0], i+1)
			os.Exit(code)
		}
	}
	os.Exit(code)
}
