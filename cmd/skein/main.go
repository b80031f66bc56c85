// Skein is one static binary: daemon, supervisor and command line.
package main

import (
	"fmt"
	"os"

	"skein/cmd/cli"
	"skein/cmd/daemon"
	"skein/cmd/demo"
	"skein/cmd/dev"
	"skein/runtime/supervisor"
)

// version is set by the linker.
var version = "0.1.0-dev"

func main() {
	if len(os.Args) > 1 && os.Args[1] == "supervisor" { // first of all: it forks its zygote while this process is small
		if err := supervisor.Main(os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, "skein supervisor:", err)
			os.Exit(1)
		}
		return
	}
	os.Exit(cli.Main(version, daemon.Command(version), dev.Command(), dev.EnterCommand(), demo.Command()))
}
