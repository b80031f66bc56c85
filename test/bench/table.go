package main

import (
	"fmt"
	"slices"
	"time"
)

// row prints one line of the table: wall times of the rounds and CPU per round, unless it was not measured.
func row(name string, walls []time.Duration, cpu time.Duration) {
	if len(walls) == 0 {
		return
	}
	l := slices.Clone(walls)
	slices.Sort(l)
	fmt.Printf("  %-46s %4d rounds  min %9s  median %9s  p95 %9s", name, len(l), ms(l[0]), ms(l[len(l)/2]), ms(l[(len(l)*95)/100]))
	if cpu > 0 {
		fmt.Printf("  CPU %9s", ms(cpu/time.Duration(len(l))))
	}
	fmt.Println()
}

func ms(d time.Duration) string { return fmt.Sprintf("%.2f ms", float64(d)/1e6) }

func mib(n int64) string { return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20)) }
