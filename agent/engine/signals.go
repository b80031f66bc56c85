package engine

import (
	"slices"
	"sort"
	"strconv"
	"strings"
	"syscall"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// parseSignal reads "TERM", "SIGTERM", "15", "RTMIN+3"; empty is 0.
func parseSignal(s string) (syscall.Signal, error) {
	if s == "" {
		return 0, nil
	}
	if n, err := strconv.Atoi(s); err == nil {
		if n < 1 || n > 64 {
			return 0, invalid("invalid signal: %s", s)
		}
		return syscall.Signal(n), nil
	}
	name := strings.ToUpper(s)
	if !strings.HasPrefix(name, "SIG") {
		name = "SIG" + name
	}
	if n := unix.SignalNum(name); n != 0 {
		return n, nil
	}
	if off, ok := strings.CutPrefix(name, "SIGRTMIN"); ok {
		if n, err := strconv.Atoi("0" + strings.TrimPrefix(off, "+")); err == nil && 34+n <= 64 {
			return syscall.Signal(34 + n), nil
		}
	}
	return 0, invalid("invalid signal: %s", s)
}

func contains(list []string, s string) bool { return slices.Contains(list, s) }

func sortNewest(list []*entry) {
	sort.SliceStable(list, func(i, j int) bool {
		a, b := list[i].rec, list[j].rec // Created and ID never change
		if !a.Created.Equal(b.Created) {
			return a.Created.After(b.Created)
		}
		return a.ID < b.ID
	})
}

func sortByDepth(m []specs.Mount) {
	sort.SliceStable(m, func(i, j int) bool {
		return strings.Count(m[i].Destination, "/") < strings.Count(m[j].Destination, "/")
	})
}
