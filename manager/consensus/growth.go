package consensus

import (
	"errors"
	"io"
	"sync"

	"github.com/hashicorp/raft"
)

// minGrowth is how much the log grows at least between snapshots that are taken for its size. Above, it may grow as large as the last
// snapshot: writing snapshots then costs at most as much as writing the log.
const minGrowth = 64 << 20

// growth asks for a snapshot when the log has grown much since the last one; raft itself counts entries only.
type growth struct {
	least int64
	ask   chan struct{}

	mu    sync.Mutex
	bytes int64 // applied since the last snapshot began
	last  int64 // size of the last snapshot
	asked bool
}

func newGrowth(least int64) *growth { return &growth{least: least, ask: make(chan struct{}, 1)} }

// applied notes an entry.
func (g *growth) applied(size int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.bytes += int64(size)
	if g.asked || g.bytes <= max(g.least, g.last) {
		return
	}
	g.asked = true
	g.ask <- struct{}{} // nothing is in it: asked was false
}

// begun notes that a snapshot was captured.
func (g *growth) begun() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.bytes = 0
}

// sized notes how large the newest snapshot is.
func (g *growth) sized(n int64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.last = n
}

// answered lets it ask again.
func (g *growth) answered() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.asked = false
}

// snapshotLoop takes the snapshots that are asked for.
func (n *Node) snapshotLoop() {
	defer n.wg.Done()
	for {
		select {
		case <-n.closed:
			return
		case <-n.growth.ask:
		}
		err := n.raft.Snapshot().Error()
		if err != nil && !errors.Is(err, raft.ErrNothingNewToSnapshot) && !errors.Is(err, raft.ErrRaftShutdown) {
			n.log.Warn("take a snapshot of the grown log", "err", err)
		}
		n.growth.answered()
	}
}

// counter counts what goes through it.
type counter struct {
	w io.Writer
	r io.Reader
	n int64
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}
