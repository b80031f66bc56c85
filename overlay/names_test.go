package overlay

import (
	"net/netip"
	"testing"

	"skein/overlay/link"
)

// TestNodeNames: every index has a MAC, next hops and a block of its own, and none is a leg's MAC or the legs' gateway.
func TestNodeNames(t *testing.T) {
	macs, vias := map[link.MAC]uint32{}, map[netip.Addr]uint32{gatewayVia: 0}
	for i := uint32(1); i <= maxNode; i++ {
		mac := nodeMAC(0xabcdef, i)
		if other, taken := macs[mac]; taken || mac[1] >= overlayLeg && mac[1] <= bridgeLeg || mac == outerMAC || mac[0]&3 != 2 {
			t.Fatalf("MAC %v of node %d: taken by node %d, a leg's, or not a station's own", mac, i, other)
		}
		macs[mac] = i
		for _, v6 := range []bool{false, true} {
			via := nodeVia(i, v6)
			if other, taken := vias[via]; taken || !via.IsLinkLocalUnicast() {
				t.Fatalf("next hop %v of node %d is taken by node %d, or not link-local", via, i, other)
			}
			vias[via] = i
		}
		if markBase+i&markMask != markBase {
			t.Fatalf("mark of node %d lies outside of its mask", i)
		}
	}
	if got := nodeMAC(4090, 4094); got != (link.MAC{0x02, 0x5f, 0xfe, 0x00, 0x0f, 0xfa}) {
		t.Errorf("MAC of node 4094 is %v: running clusters know it otherwise", got)
	}
}
