package nemesis

import (
	"errors"
	"fmt"
	"path/filepath"
	"sync"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"skein/cmd/dev"
)

const wireTable = "nemesis"

// drop is packets that get lost on the cluster's bridge.
type drop struct {
	from, to string // nodes; empty: any
	percent  uint32
}

// wire is one nftables table on the cluster's bridge.
type wire struct {
	fabric string

	mu    sync.Mutex
	next  int
	rules map[int][]drop
}

func newWire(c *dev.Cluster) *wire { return &wire{fabric: c.Fabric(), rules: map[int][]drop{}} }

// add drops packets until the returned function is called.
func (w *wire) add(drops ...drop) (undo func() error, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.next++
	id := w.next
	w.rules[id] = drops
	if err := w.load(); err != nil {
		delete(w.rules, id)
		return nil, errors.Join(err, w.load())
	}
	return func() error {
		w.mu.Lock()
		defer w.mu.Unlock()
		delete(w.rules, id)
		return w.load()
	}, nil
}

// load replaces the table in one transaction.
func (w *wire) load() error {
	ns, err := netns.GetFromPath(filepath.Join("/run/netns", w.fabric))
	if err != nil {
		return fmt.Errorf("network namespace %s: %w", w.fabric, err)
	}
	defer ns.Close()
	c, err := nftables.New(nftables.WithNetNSFd(int(ns)))
	if err != nil {
		return err
	}
	t := c.AddTable(&nftables.Table{Name: wireTable, Family: nftables.TableFamilyBridge})
	c.DelTable(t)
	if len(w.rules) > 0 {
		c.AddTable(t)
		ch := c.AddChain(&nftables.Chain{Name: "forward", Table: t, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookForward, Priority: nftables.ChainPriorityFilter})
		for _, list := range w.rules {
			for _, d := range list {
				c.AddRule(&nftables.Rule{Table: t, Chain: ch, Exprs: d.exprs()})
			}
		}
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("change what the wire drops: %w", err)
	}
	return nil
}

func (d drop) exprs() []expr.Any {
	var out []expr.Any
	for _, m := range []struct {
		key  expr.MetaKey
		name string
	}{{expr.MetaKeyIIFNAME, d.from}, {expr.MetaKeyOIFNAME, d.to}} {
		if m.name != "" {
			dev := make([]byte, unix.IFNAMSIZ)
			copy(dev, m.name)
			out = append(out, &expr.Meta{Key: m.key, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: dev})
		}
	}
	if d.percent < 100 {
		out = append(out, &expr.Numgen{Register: 1, Modulus: 100, Type: unix.NFT_NG_RANDOM},
			&expr.Cmp{Op: expr.CmpOpLt, Register: 1, Data: binaryutil.NativeEndian.PutUint32(d.percent)})
	}
	return append(out, &expr.Verdict{Kind: expr.VerdictDrop})
}
