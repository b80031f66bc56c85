package scheduler

import (
	"slices"
	"strings"
)

// tree sorts all nodes by their values of some labels, outermost first: a branch is a value of the first label, its children values of the
// second among these nodes, and so on. It is compiled once for all services with the same preferences.
type tree struct {
	labels   []string
	branches []treeBranch // the first is the root
	byValue  map[branchValue]int32
	leaf     []int32 // by node: its branch at the end, -1 none

	open map[*class]openBranches
}

// openBranches are the branches with a ready node of a class, as of an epoch of the scheduler.
type openBranches struct {
	epoch    uint64
	branches []int32
}

type treeBranch struct {
	parent   int32
	children []int32
	members  []int32 // of a leaf: its nodes
}

type branchValue struct {
	parent int32
	value  string
}

func (s *Scheduler) tree(labels []string) *tree {
	key := strings.Join(labels, "\x00")
	if t := s.trees[key]; t != nil {
		return t
	}
	if len(s.trees) >= maxTrees {
		clear(s.trees)
	}
	t := &tree{labels: labels, branches: []treeBranch{{parent: -1}}, byValue: map[branchValue]int32{}, open: map[*class]openBranches{}}
	for i := range s.nodes {
		if s.nodes[i].ID != "" {
			t.set(int32(i), &s.nodes[i])
		}
	}
	s.trees[key] = t
	return t
}

func (t *tree) set(i int32, n *Node) {
	for int(i) >= len(t.leaf) {
		t.leaf = append(t.leaf, -1)
	}
	b := int32(0)
	for _, label := range t.labels {
		k := branchValue{b, attribute(n, label)}
		child, known := t.byValue[k]
		if !known {
			child = int32(len(t.branches))
			t.byValue[k] = child
			t.branches = append(t.branches, treeBranch{parent: b})
			t.branches[b].children = append(t.branches[b].children, child)
		}
		b = child
	}
	if t.leaf[i] == b {
		return
	}
	t.remove(i)
	clear(t.open)
	t.leaf[i] = b
	t.branches[b].members = append(t.branches[b].members, i)
}

func (t *tree) remove(i int32) {
	if int(i) >= len(t.leaf) || t.leaf[i] < 0 {
		return
	}
	clear(t.open)
	m := &t.branches[t.leaf[i]].members
	*m = slices.DeleteFunc(*m, func(j int32) bool { return j == i })
	t.leaf[i] = -1
}

// candidates lists the branches with a ready node of the class.
func (t *tree) candidates(s *Scheduler, c *class) []int32 {
	if o, known := t.open[c]; known && o.epoch == s.epoch {
		return o.branches
	}
	if len(t.open) >= maxClasses {
		clear(t.open)
	}
	seen := make([]bool, len(t.branches))
	var out []int32
	c.nodes.each(s.ready, func(i int32) {
		for b := t.leaf[i]; b >= 0 && !seen[b]; b = t.branches[b].parent {
			seen[b] = true
			out = append(out, b)
		}
	})
	t.open[c] = openBranches{s.epoch, out}
	return out
}

// levelling places one group over a tree. A preference is soft: branches level out by their tasks, and one without room gives its share
// to its neighbours.
type levelling struct {
	p     *placer
	t     *tree
	load  []int // by branch: tasks of the service, also on nodes that take no more
	open  []bool
	share []int // by leaf, in the round
}

func (p *placer) level() {
	t := p.s.tree(p.g.Req.Spread)
	l := levelling{p: p, t: t, load: make([]int, len(t.branches)), open: make([]bool, len(t.branches)), share: make([]int, len(t.branches))}
	for _, b := range t.candidates(p.s, p.class) {
		l.open[b] = true
	}
	p.sv.count.each(func(i, n int32) {
		if int(i) < len(t.leaf) && t.leaf[i] >= 0 {
			l.add(t.leaf[i], int(n))
		}
	})
	for left := p.g.Count; left > 0 && l.open[0]; {
		l.divide(0, left)
		if left < p.class.size/16 {
			left -= l.walk(left)
		}
		for b := range l.share {
			want := l.share[b]
			if want == 0 {
				continue
			}
			l.share[b] = 0
			done := p.fillFrom(t.branches[b].members, want)
			left -= done
			l.add(int32(b), done)
			if done < want {
				l.shut(int32(b))
			}
		}
	}
}

// walk places what it can of the shares of all leaves in one walk over the least loaded nodes.
func (l *levelling) walk(k int) int {
	return l.p.walkWhere(k, func(i int32) bool {
		b := l.t.leaf[i]
		if b < 0 || l.share[b] == 0 {
			return false
		}
		l.share[b]--
		l.add(b, 1)
		return true
	})
}

func (l *levelling) add(b int32, n int) {
	for ; b >= 0; b = l.t.branches[b].parent {
		l.load[b] += n
	}
}

// shut closes a leaf without room, and every branch that is left without an open child.
func (l *levelling) shut(b int32) {
	for b >= 0 && !slices.ContainsFunc(l.t.branches[b].children, func(c int32) bool { return l.open[c] }) {
		l.open[b] = false
		b = l.t.branches[b].parent
	}
}

// divide gives n tasks to the open children of a branch so that their loads level out, the lowest first, and so on down to the leaves.
func (l *levelling) divide(b int32, n int) {
	br := &l.t.branches[b]
	if len(br.children) == 0 {
		l.share[b] = n
		return
	}
	var open []int32
	for _, c := range br.children {
		if l.open[c] {
			open = append(open, c)
		}
	}
	slices.SortStableFunc(open, func(x, y int32) int { return l.load[x] - l.load[y] })
	// The first k children are raised to one level, which the next one is above of.
	k, sum := 0, 0
	for k < len(open) && (k == 0 || l.load[open[k]]*k-sum < n) {
		sum += l.load[open[k]]
		k++
	}
	level, rest := (sum+n)/k, (sum+n)%k
	slices.Sort(open[:k])
	for _, c := range open[:k] {
		give := level - l.load[c]
		if rest > 0 {
			give++
			rest--
		}
		if give > 0 {
			l.divide(c, give)
		}
	}
}
