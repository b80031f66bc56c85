// Skein is one static binary: daemon, supervisor and command line.
package main

import (
	"flag"
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
	if len(os.Args) > 1 && os.Args[1] == "supervisor" {
		if err := supervise(os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, "skein supervisor:", err)
			os.Exit(1)
		}
		return
	}
	os.Exit(cli.Main(version, daemon.Command(version), dev.Command(), dev.EnterCommand(), demo.Command()))
}

// supervise comes before everything else: the supervisor forks its zygote while this process is small.
func supervise(args []string) error {
	var cfg supervisor.Config
	f := flag.NewFlagSet("supervisor", flag.ContinueOnError)
	f.StringVar(&cfg.StateDir, "state-dir", "", "directory of records and journal")
	f.StringVar(&cfg.SocketPath, "socket", "", "socket of the daemon")
	f.StringVar(&cfg.Cgroup, "cgroup", "", "parent of the containers' cgroups")
	if err := f.Parse(args); err != nil {
		return err
	}
	return supervisor.Serve(cfg)
}
