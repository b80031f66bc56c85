// Package lb deals backends to slots. A packet draws a slot at random; how many slots a backend holds is its share.
//
// Fill guarantees that shares differ by at most one and that as few slots as possible change hands when a backend comes or goes, so that
// one change of an endpoint rewrites about n/backends elements. It is pure; package overlay writes the result into the kernel.
package lb

// Class is the smallest of the ascending sizes that has room for n backends, or the greatest.
func Class(n int, sizes []int) int {
	for _, s := range sizes {
		if n <= s {
			return s
		}
	}
	return sizes[len(sizes)-1]
}

// Fill deals the backends to size slots, starting from what the slots held before (prev, of any length; zero values are empty slots).
// Backends must be distinct. With no backends the result is nil. With more backends than slots those at the end get none.
func Fill[T comparable](prev []T, backends []T, size int) []T {
	if len(backends) == 0 {
		return nil
	}
	if len(backends) > size {
		backends = backends[:size]
	}
	share, extra := size/len(backends), size%len(backends)
	held := make(map[T]int, len(backends))
	for _, b := range backends {
		held[b] = 0
	}
	slots := make([]T, size)
	free := make([]int, 0, size)
	for i := range slots {
		if i < len(prev) {
			if n, ok := held[prev[i]]; ok && (n < share || n == share && extra > 0) {
				if n == share {
					extra--
				}
				held[prev[i]]++
				slots[i] = prev[i]
				continue
			}
		}
		free = append(free, i)
	}
	for len(free) > 0 {
		for _, b := range backends {
			n := held[b]
			if len(free) == 0 || n > share || n == share && extra == 0 {
				continue
			}
			if n == share {
				extra--
			}
			held[b]++
			slots[free[0]] = b
			free = free[1:]
		}
	}
	return slots
}
