package overlay

import (
	"slices"

	"skein/overlay/lb"
	"skein/overlay/nft"
)

// dealer keeps the slots of many services in one map of an nft table, and touches only those whose backends changed.
type dealer struct {
	slots, verdicts *nft.Set
	groups          map[string]dealt // by key in verdicts; nil before the first update
}

type dealt struct {
	given    []string // as they were told
	backends []string // encoded, sorted
	slotKey  func(int) string
	size     int
}

// share is what a service should have.
type share struct {
	backends []string
	slotKey  func(int) string
}

func newDealer(t *nft.Table, verdicts string) *dealer {
	return &dealer{slots: t.Set("slots"), verdicts: t.Set(verdicts)}
}

// update brings both sets to what want says. The first time it also drops what an earlier driver left there.
func (d *dealer) update(want map[string]share) {
	first := d.groups == nil
	if first {
		d.groups = map[string]dealt{}
	}
	for key, g := range d.groups {
		if _, ok := want[key]; !ok {
			for i := range g.size {
				d.slots.Delete(g.slotKey(i))
			}
			d.verdicts.Delete(key)
			delete(d.groups, key)
		}
	}
	for key, s := range want {
		if g, ok := d.groups[key]; ok && slices.Equal(g.given, s.backends) {
			continue
		}
		sorted := slices.Compact(slices.Sorted(slices.Values(s.backends)))
		if g, ok := d.groups[key]; !ok || !slices.Equal(g.backends, sorted) {
			d.deal(key, sorted, s.slotKey)
		}
		g := d.groups[key]
		g.given = s.backends
		d.groups[key] = g
	}
	if first {
		d.dropOthers()
	}
}

func (d *dealer) deal(key string, backends []string, slotKey func(int) string) {
	size := lb.Class(len(backends), nft.SlotClasses())
	prev := make([]string, size)
	for i := range prev {
		prev[i] = d.slots.Get(slotKey(i))
	}
	for i, b := range lb.Fill(prev, backends, size) {
		d.slots.Put(slotKey(i), b)
	}
	for i := size; i < d.groups[key].size; i++ {
		d.slots.Delete(slotKey(i))
	}
	d.verdicts.Put(key, nft.PickChain(size))
	d.groups[key] = dealt{backends: backends, slotKey: slotKey, size: size}
}

func (d *dealer) dropOthers() {
	slots, verdicts := map[string]string{}, map[string]string{}
	for key, g := range d.groups {
		verdicts[key] = d.verdicts.Get(key)
		for i := range g.size {
			k := g.slotKey(i)
			slots[k] = d.slots.Get(k)
		}
	}
	d.slots.Replace(slots)
	d.verdicts.Replace(verdicts)
}
