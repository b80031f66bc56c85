// Package nemesis breaks managers of a development cluster by a plan: who is broken how, when and for how long follows from a seed alone,
// is printed, and can be run again. It also holds the rig that the programs which use it share: a cluster, a registry with one small
// image, a client for every node. Used by test/linear, test/power and test/chaos.
package nemesis

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"time"
)

// Kind is a way to break a manager.
type Kind string

// The faults. Each is undone after its time.
const (
	Kill    Kind = "kill"     // SIGKILL of the daemon, started again
	Stop    Kind = "stop"     // SIGSTOP of the daemon
	Cut     Kind = "cut"      // no packet in or out
	CutIn   Kind = "cut-in"   // it hears nothing
	CutOut  Kind = "cut-out"  // it is not heard
	CutPair Kind = "cut-pair" // it and one other manager do not reach each other
	Flap    Kind = "flap"     // cut and healed again and again
	Loss    Kind = "loss"     // a share of the packets in and out is dropped
	Fill    Kind = "fill"     // its disk is full
	Slow    Kind = "slow"     // its disk takes 100 writes a second
	KillAll Kind = "kill-all" // SIGKILL of all managers' daemons
	Fail    Kind = "fail"     // its disk answers every write and sync with an error: the daemon must end itself, and is started with the disk mounted anew
)

// Needs of faults.
var diskFaults = []Kind{Fill, Slow, Fail}

// kinds with their weights.
var kinds = []struct {
	kind     Kind
	weight   int
	min, max time.Duration // of the fault
}{
	{Kill, 5, 0, 3 * time.Second},
	{Stop, 5, Lease, 10 * Lease},
	{Cut, 4, 500 * time.Millisecond, 6 * time.Second},
	{CutIn, 2, 500 * time.Millisecond, 6 * time.Second},
	{CutOut, 2, 500 * time.Millisecond, 6 * time.Second},
	{CutPair, 2, 500 * time.Millisecond, 6 * time.Second},
	{Flap, 2, 2 * time.Second, 5 * time.Second},
	{Loss, 3, 2 * time.Second, 8 * time.Second},
	{Fill, 2, 2 * time.Second, 6 * time.Second},
	{Slow, 2, 2 * time.Second, 8 * time.Second},
	{KillAll, 1, 0, 2 * time.Second},
	{Fail, 1, time.Second, 3 * time.Second},
}

// Lease is how long a leader leads without a word from the others: the product's default.
const Lease = 400 * time.Millisecond

// Pause between the starts of two faults.
const (
	minPause = 2 * time.Second
	maxPause = 8 * time.Second
)

// Step is one fault of a plan.
type Step struct {
	At      time.Duration // since the start
	Kind    Kind
	Leader  bool // whether whoever leads then is broken, else a follower
	Pick    int  // which follower, modulo their number
	For     time.Duration
	Percent int // of Loss; how much of the disk's room Fill leaves
}

// String is the step as it is printed.
func (s Step) String() string {
	who := "leader"
	if !s.Leader {
		who = fmt.Sprintf("follower %d", s.Pick)
	}
	extra := ""
	if s.Kind == Loss || s.Kind == Fill {
		extra = fmt.Sprintf(" %d%%", s.Percent)
	}
	return fmt.Sprintf("%6.1fs %-8s%s %s for %.1fs", s.At.Seconds(), s.Kind, extra, who, s.For.Seconds())
}

// Plan makes the faults of a run. Equal arguments give equal plans. Only the kinds in among are used; none: all that need no disk, or all.
func Plan(seed uint64, length time.Duration, disks bool, among ...Kind) []Step {
	r := rand.New(rand.NewPCG(seed, 0x6e656d))
	has := func(list []Kind, k Kind) bool {
		for _, x := range list {
			if x == k {
				return true
			}
		}
		return false
	}
	total := 0
	usable := kinds[:0:0]
	for _, k := range kinds {
		if (!disks && has(diskFaults, k.kind)) || (len(among) > 0 && !has(among, k.kind)) {
			continue
		}
		usable = append(usable, k)
		total += k.weight
	}
	between := func(lo, hi time.Duration) time.Duration { return lo + time.Duration(r.Int64N(int64(hi-lo)+1)) }
	var plan []Step
	for at := between(minPause/2, minPause); at < length && total > 0; at += between(minPause, maxPause) {
		w, i := r.IntN(total), 0
		for ; w >= usable[i].weight; i++ {
			w -= usable[i].weight
		}
		k := usable[i]
		plan = append(plan, Step{At: at.Round(time.Millisecond), Kind: k.kind, Leader: r.IntN(3) > 0, Pick: r.IntN(8),
			For: min(between(k.min, k.max), length-at).Round(time.Millisecond), Percent: 10 + r.IntN(41)})
	}
	return plan
}

// Kinds reads names separated by commas.
func Kinds(names string) ([]Kind, error) {
	var out []Kind
	for _, n := range strings.FieldsFunc(names, func(c rune) bool { return c == ',' }) {
		found := false
		for _, k := range kinds {
			if found = string(k.kind) == n; found {
				out = append(out, k.kind)
				break
			}
		}
		if !found {
			return nil, fmt.Errorf("there is no fault %q", n)
		}
	}
	return out, nil
}
