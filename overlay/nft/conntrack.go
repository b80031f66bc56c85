package nft

import (
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"skein/overlay/link"
)

// Attributes of ctnetlink that we use (linux/netfilter/nfnetlink_conntrack.h).
const (
	ctGet          = unix.NFNL_SUBSYS_CTNETLINK<<8 | 1
	ctDelete       = unix.NFNL_SUBSYS_CTNETLINK<<8 | 2
	ctaTupleOrig   = 1
	ctaTupleReply  = 2
	ctaZone        = 18
	ctaFilter      = 25
	ctaTupleIP     = 1
	ctaTupleProto  = 2
	ctaV4Src       = 1
	ctaV6Src       = 3
	ctaProtoNum    = 1
	ctaFilterReply = 2
	ctaFilterIPSrc = 1
)

// ForgetFlows deletes the connection tracking entries whose answers come from a, so that clients of something that is gone are refused or
// dealt anew instead of waiting for ever. With protocol not zero only entries of that protocol.
func (s *Syncer) ForgetFlows(a netip.Addr, protocol byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	family, attr := byte(unix.AF_INET), uint16(ctaV4Src)
	if a.Is6() {
		family, attr = unix.AF_INET6, ctaV6Src
	}
	var req link.Attrs
	req.Nest(ctaTupleReply, nil, func(t *link.Attrs) {
		t.Nest(ctaTupleIP, nil, func(ip *link.Attrs) { ip.Bytes(attr, a.AsSlice()) })
	})
	req.Nest(ctaFilter, nil, func(f *link.Attrs) { f.U32(ctaFilterReply, ctaFilterIPSrc) })
	head := []byte{family, unix.NFNETLINK_V0, 0, 0}
	var dels []link.Message
	err := s.sock.Dump(link.Message{Type: ctGet, Body: append(head, req.Encoded()...)}, func(_ uint16, b []byte) error {
		var del link.Attrs
		var src netip.Addr
		var proto byte
		for typ, v := range link.Parse(b[4:]) {
			switch typ {
			case ctaTupleOrig:
				del.Bytes(ctaTupleOrig|unix.NLA_F_NESTED, v)
			case ctaZone:
				del.Bytes(ctaZone, v)
			case ctaTupleReply:
				src, proto = tupleSource(v, attr)
			}
		}
		if src == a && (protocol == 0 || proto == protocol) { // a kernel that does not know the filter sends all
			dels = append(dels, link.Message{Type: ctDelete, Body: append([]byte{family, unix.NFNETLINK_V0, 0, 0}, del.Encoded()...)})
		}
		return nil
	})
	if errors.Is(err, unix.EINTR) { // the table changed meanwhile; what was seen is what we want to delete
		err = nil
	}
	if err == nil {
		err = s.sock.Do(dels, unix.ENOENT)
	}
	if err != nil {
		return 0, fmt.Errorf("forget connections to %s: %w", a, err)
	}
	return len(dels), nil
}

func tupleSource(tuple []byte, attr uint16) (src netip.Addr, proto byte) {
	for typ, v := range link.Parse(tuple) {
		for inner, d := range link.Parse(v) {
			switch {
			case typ == ctaTupleIP && inner == attr:
				src, _ = netip.AddrFromSlice(d)
			case typ == ctaTupleProto && inner == ctaProtoNum && len(d) == 1:
				proto = d[0]
			}
		}
	}
	return src, proto
}
