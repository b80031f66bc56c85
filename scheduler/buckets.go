package scheduler

// buckets keep the ready nodes in intrusive lists by the number of their tasks, so that the least loaded ones are found without a look at
// the others.
type buckets struct {
	head       []int32 // by number of tasks: the first node, -1 none
	next, prev []int32 // by node
	at         []int32 // by node: its bucket, -1 none
	low        int32   // no node is in a bucket below
	n          int     // nodes in all buckets
}

func (b *buckets) grow() {
	b.next, b.prev, b.at = append(b.next, -1), append(b.prev, -1), append(b.at, -1)
}

// put moves a node to the bucket of its number of tasks, or takes it out of all.
func (b *buckets) put(i, tasks int32, in bool) {
	if in && b.at[i] == tasks {
		return
	}
	if old := b.at[i]; old >= 0 {
		if b.prev[i] >= 0 {
			b.next[b.prev[i]] = b.next[i]
		} else {
			b.head[old] = b.next[i]
		}
		if b.next[i] >= 0 {
			b.prev[b.next[i]] = b.prev[i]
		}
		b.at[i] = -1
		b.n--
	}
	if !in {
		return
	}
	for int(tasks) >= len(b.head) {
		b.head = append(b.head, -1)
	}
	h := b.head[tasks]
	b.next[i], b.prev[i], b.at[i], b.head[tasks] = h, -1, tasks, i
	if h >= 0 {
		b.prev[h] = i
	}
	b.low = min(b.low, tasks)
	b.n++
}

// lowest is the first bucket that may hold a node.
func (b *buckets) lowest() int32 {
	for int(b.low) < len(b.head) && b.head[b.low] < 0 {
		b.low++
	}
	return b.low
}
