package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/client"

	"skein/test/nemesis"
)

const (
	healBar    = 5 * time.Second // from room on the disks to the first write
	slowLength = 8 * time.Second
	noRoom     = 10 // percent of nemesis.Fill that leaves nothing
	smallDisk  = 256
)

// diskMeasurements need a disk for every manager.
var diskMeasurements = []measurement{
	{"disk-full-leader", "the leader's disk is full to the first accepted write", 2 * time.Second, failoverTime, fullLeader},
	{"disk-full-all", "all managers' disks have room again to the first accepted write", 0, healBar, fullAll},
	{"disk-slow-leader", "100 writes a second on the leader's disk for 8 s: the longest time without an accepted write, at most one election", 0, failoverTime, slow(true)},
	{"disk-slow-follower", "100 writes a second on a follower's disk for 8 s: the longest time without an accepted write, no election", 0, time.Second, slow(false)},
}

func fullLeader(ctx context.Context, f *figures) (time.Duration, error) {
	lead, err := f.Leader(ctx, 5*time.Second)
	if err != nil {
		return 0, err
	}
	undo, err := f.x.Break(ctx, lead, nemesis.Step{Kind: nemesis.Fill, Percent: noRoom})
	if err != nil {
		return 0, err
	}
	took, err := f.firstWrite(ctx, lead, time.Now())
	return took, errors.Join(err, undo())
}

// fullAll fills all disks: writes must be refused with the reason, reads go on; then there is room again.
func fullAll(ctx context.Context, f *figures) (time.Duration, error) {
	var undo []func() error
	heal := func() (err error) {
		for _, u := range undo {
			err = errors.Join(err, u())
		}
		undo = nil
		return err
	}
	for _, m := range f.Managers() {
		u, err := f.x.Break(ctx, m, nemesis.Step{Kind: nemesis.Fill, Percent: noRoom})
		if err != nil {
			return 0, errors.Join(err, heal())
		}
		undo = append(undo, u)
	}
	if err := f.refused(ctx); err != nil {
		return 0, errors.Join(err, heal())
	}
	if err := heal(); err != nil {
		return 0, err
	}
	return f.firstWrite(ctx, nil, time.Now())
}

// refused waits until a write is refused for want of room, and reads.
func (f *figures) refused(ctx context.Context) error {
	var last error
	for begun := time.Now(); time.Since(begun) < writeWait && ctx.Err() == nil; nemesis.Sleep(ctx, 10*figurePause) {
		f.n++
		if last = f.write(ctx, fmt.Sprintf("full%d", f.n)); last != nil && strings.Contains(last.Error(), "free space") {
			_, _, err := f.running(ctx, f.Managers()[0], "")
			return err
		}
	}
	return fmt.Errorf("all disks are full, and no write was refused with the reason within %v: %w", writeWait, last)
}

// write makes a config and removes it.
func (f *figures) write(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(ctx, writeWait)
	defer cancel()
	api := f.Client(f.Managers()[f.n%len(f.Managers())])
	_, err := api.ConfigCreate(ctx, client.ConfigCreateOptions{Spec: swarm.ConfigSpec{Annotations: swarm.Annotations{Name: name}, Data: []byte("x")}})
	if err == nil {
		_, err = api.ConfigRemove(ctx, name, client.ConfigRemoveOptions{})
	}
	return err
}

func slow(leader bool) func(context.Context, *figures) (time.Duration, error) {
	return func(ctx context.Context, f *figures) (time.Duration, error) {
		n, err := f.Leader(ctx, 5*time.Second)
		if err != nil {
			return 0, err
		}
		allowed := 1
		if !leader {
			allowed = 0
			for _, m := range f.Managers() {
				if m != n {
					n = m
					break
				}
			}
		}
		elections := f.elections()
		undo, err := f.x.Break(ctx, n, nemesis.Step{Kind: nemesis.Slow})
		if err != nil {
			return 0, err
		}
		longest, last := time.Duration(0), time.Now()
		for begun := last; time.Since(begun) < slowLength && ctx.Err() == nil; {
			f.n++
			if f.write(ctx, fmt.Sprintf("slow%d", f.n)) == nil {
				longest, last = max(longest, time.Since(last)), time.Now()
			}
		}
		longest = max(longest, time.Since(last))
		if err := undo(); err != nil {
			return 0, err
		}
		if got := f.elections() - elections; got > allowed {
			return longest, fmt.Errorf("%d elections, at most %d are promised", got, allowed)
		}
		return longest, nil
	}
}
