package attack

import (
	"flag"
	"fmt"
	"os"
	"testing"

	"skein/runtime/cgroup"
	"skein/runtime/supervisor"
)

// long selects the long mode: every race runs at least 10,000 rounds and every flood its full size. go test ./test/attack -args -long
var long = flag.Bool("long", false, "run races for 10,000 rounds and floods at full size")

// rounds overrides the number of rounds of each race.
var rounds = flag.Int("rounds", 0, "rounds of each race; 0: few, or 10,000 with -long")

// manyRounds is how often a race is run: few are enough to see a naive implementation fail, the long mode looks for rare ones.
func manyRounds(few int) int {
	switch {
	case *rounds > 0:
		return *rounds
	case *long:
		return 10_000
	}
	return few
}

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "supervisor" { // started by supervisor.Ensure
		if err := supervisor.Main(os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if os.Getenv(insideEnv) != "" {
		fmt.Println("the host's file runs inside a container")
		os.Exit(99)
	}
	code := m.Run()
	removeBuilt()
	if err := cgroup.RemoveTree(ownGroups()); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// ownGroups is the parent of the groups of all worlds.
func ownGroups() string { return fmt.Sprintf("/skein-attack-%d", os.Getpid()) }
