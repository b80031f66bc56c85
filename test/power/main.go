// Command power takes the power of all managers away at once, again and again, and looks at what boots; and it damages files of one.
//
//	go run ./test/power -rounds 200 -seed 7
//	go run ./test/power -rounds 0 -rot 30 -seed 7
//
// It needs root and mkfs.ext4. Each manager's state lies on an ext4 image of its own. In a round clients write at all managers; at a random
// instant the whole cluster is frozen, the images are copied, everything is killed, and all managers boot from the copies: what a disk
// holds that loses its power, with everything gone that was not synced. All of them must boot, agree on a leader, and show every
// acknowledged write; what was asked for and not acknowledged may be there; nothing else may.
//
// A round of -rot damages one manager's raft log, snapshots, keys, identity or journal while it is down: bits are flipped, a page is zeroed, the
// end is cut off. The others serve all the time. The node must refuse to start and name the file, or be as good as before: it is made
// leader then and asked for everything. One that refused is removed, wiped and joins anew.
//
// Files: load.go (what is written and what may be read), power.go, rot.go.
package main

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/signal"
	"syscall"
	"time"

	"skein/test/nemesis"
)

type options struct {
	name     string
	binary   string
	managers int
	rounds   int
	rot      int
	seed     uint64
	keep     bool
}

// world is a run.
type world struct {
	*nemesis.Rig
	opts   options
	rand   *rand.Rand
	load   *load
	broken []string
	boots  []time.Duration
	joins  []time.Duration
}

func main() {
	var o options
	flag.StringVar(&o.name, "name", "pow", "name of the development cluster")
	flag.StringVar(&o.binary, "binary", "", "the skein executable (default: build it)")
	flag.IntVar(&o.managers, "managers", 3, "number of managers")
	flag.IntVar(&o.rounds, "rounds", 20, "losses of power")
	flag.IntVar(&o.rot, "rot", 0, "damages of one manager's files, after the losses of power")
	flag.Uint64Var(&o.seed, "seed", uint64(time.Now().UnixNano()%100000), "seed of instants, writes and damages")
	flag.BoolVar(&o.keep, "keep", false, "leave the cluster up when a promise was broken")
	flag.Parse()
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	broken, err := run(ctx, o)
	cancel()
	if err != nil {
		fmt.Fprintln(os.Stderr, "power:", err)
		os.Exit(2)
	}
	if broken > 0 {
		os.Exit(1)
	}
}

// run does one run and returns how many promises were broken.
func run(ctx context.Context, o options) (broken int, err error) {
	rig, err := nemesis.NewRig(ctx, nemesis.Options{Name: o.name, Managers: o.managers, DiskMiB: 256, Binary: o.binary})
	if err != nil {
		return 0, err
	}
	w := &world{Rig: rig, opts: o, rand: rand.New(rand.NewPCG(o.seed, 0x706f77)), load: newLoad(rig, o.seed)}
	w.Say("seed %d", o.seed)
	defer func() {
		if o.keep && len(w.broken) > 0 {
			w.Say("cluster %s is left up", o.name)
		} else if cerr := rig.Close(); cerr != nil {
			w.violate("%v", cerr)
		}
		w.summary()
		broken = len(w.broken)
	}()
	for i := 1; i <= o.rounds && ctx.Err() == nil; i++ {
		if err := w.lose(ctx, i); err != nil && ctx.Err() == nil {
			w.violate("round %d: %v", i, err)
			return 0, nil
		}
	}
	for i := 1; i <= o.rot && ctx.Err() == nil; i++ {
		if err := w.damage(ctx, i); err != nil && ctx.Err() == nil {
			w.violate("damage %d: %v", i, err)
			return 0, nil
		}
	}
	return 0, nil
}

func (w *world) violate(format string, args ...any) {
	msg := fmt.Sprintf(format, args...)
	w.broken = append(w.broken, msg)
	w.Say("BROKEN: %s", msg)
}
