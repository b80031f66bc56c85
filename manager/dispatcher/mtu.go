package dispatcher

import (
	"net/netip"
	"time"

	"google.golang.org/protobuf/proto"

	"skein/manager/api"
	"skein/manager/store"
)

const (
	tunnelHeaders4 = 50 // of a packet between nodes: IPv4, UDP, VXLAN, Ethernet
	tunnelHeaders6 = 70
	// mtuAgain is how often networks are compared with what fits at least, when nothing says that it changed.
	mtuAgain = 10 * time.Second
	leastMTU = 576
)

// FitsBetween is what a network's packets may have between all nodes, as they say; 0 if they say nothing.
func FitsBetween(facts []NodeFacts) uint32 {
	least := uint32(0)
	for _, f := range facts {
		if m := fits(f.NodeFacts, f.Underlay); m > 0 && (least == 0 || m < least) {
			least = m
		}
	}
	return least
}

// fits is what one node says of its device and its paths, less a tunnel's headers.
func fits(f *api.NodeFacts, underlay string) uint32 {
	m := f.GetUnderlayMtu()
	if p := f.GetPathMtu(); p > 0 && (m == 0 || p < m) {
		m = p
	}
	headers := uint32(tunnelHeaders4)
	if a, err := netip.ParseAddr(underlay); err == nil && a.Is6() {
		headers = tunnelHeaders6
	}
	if m < leastMTU+headers {
		return 0
	}
	return m - headers
}

// lowerMTUs has networks recorded to carry no more than fits between all nodes. They are only lowered: containers live with what they were told.
func (d *Dispatcher) lowerMTUs() {
	least := uint32(0)
	for _, n := range d.nodes {
		if n.facts == nil || n.session == nil {
			continue
		}
		if m := fits(n.facts, n.rec.UnderlayAddr); m > 0 && (least == 0 || m < least) {
			least = m
		}
	}
	if least == 0 || d.mtuBusy || least == d.mtu && time.Since(d.mtuAt) < mtuAgain {
		return
	}
	d.mtu, d.mtuAt = least, time.Now()
	var txns []*api.Txn
	d.cfg.Store.View(func(tx store.ReadTx) {
		if tx.Cluster().GetFeatureLevel() < api.LevelNetworks {
			return
		}
		for _, n := range tx.Networks() {
			if n.PathMtu != 0 && n.PathMtu <= least {
				continue
			}
			next := proto.Clone(n).(*api.NetworkRecord)
			next.PathMtu = least
			txns = append(txns, &api.Txn{Changes: []*api.Change{
				{Kind: &api.Change_Expect{Expect: &api.Expect{Kind: "network", Id: n.Id, Version: n.Meta.GetVersion()}}},
				{Kind: &api.Change_PutNetwork{PutNetwork: next}},
			}})
		}
	})
	if len(txns) == 0 {
		return
	}
	d.mtuBusy = true
	d.wg.Go(func() {
		_, _, err := d.cfg.Store.Batch(d.ctx, txns) // what was refused has changed meanwhile, and is looked at again
		if err != nil && d.ctx.Err() == nil {
			d.cfg.Log.Warn("record what networks carry", "bytes", least, "err", err)
		}
		_ = d.do(d.ctx, func() { d.mtuBusy = false })
	})
}
