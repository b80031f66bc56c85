package nft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"skein/overlay/link"
)

// Attributes of ctnetlink that we use (linux/netfilter/nfnetlink_conntrack.h).
const (
	ctGet            = unix.NFNL_SUBSYS_CTNETLINK<<8 | 1
	ctDelete         = unix.NFNL_SUBSYS_CTNETLINK<<8 | 2
	ctGetStats       = unix.NFNL_SUBSYS_CTNETLINK<<8 | 5
	ctaTupleOrig     = 1
	ctaTupleReply    = 2
	ctaStatus        = 3
	ctaZone          = 18
	ctaFilter        = 25
	ctaTupleIP       = 1
	ctaTupleProto    = 2
	ctaV4Src         = 1
	ctaV6Src         = 3
	ctaProtoNum      = 1
	ctaFilterReply   = 2
	ctaFilterIPSrc   = 1
	ctaGlobalEntries = 1
	ctSeenReply      = 1 << 1 // in ctaStatus
)

// ForgetFlows deletes the connection tracking entries whose answers come from one of addrs, so that clients of something that is gone are
// refused or dealt anew instead of waiting for ever. With protocol not zero only entries of that protocol.
//
// The kernel's table is one for all namespaces, and looking through it takes milliseconds even when it is empty: the namespace's entries
// are counted first, and any number of addresses is looked for at once.
func (s *Syncer) ForgetFlows(protocol byte, addrs ...netip.Addr) (int, error) {
	return s.forget(addrs, func(proto byte, _ uint32) bool { return protocol == 0 || proto == protocol })
}

// ForgetUnanswered deletes those of the entries that never saw an answer: the next packet of their client is dealt anew.
func (s *Syncer) ForgetUnanswered(addrs ...netip.Addr) (int, error) {
	return s.forget(addrs, func(_ byte, status uint32) bool { return status&ctSeenReply == 0 })
}

func (s *Syncer) forget(addrs []netip.Addr, which func(proto byte, status uint32) bool) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(addrs) == 0 || s.noFlows() {
		return 0, nil
	}
	gone := make(map[netip.Addr]bool, len(addrs))
	for _, a := range addrs {
		gone[a] = true
	}
	var dels []link.Message
	err := s.sock.Dump(flowsOf(addrs), func(_ uint16, b []byte) error {
		var del link.Attrs
		var src netip.Addr
		var proto byte
		status := uint32(ctSeenReply) // the kernel tells it always
		for typ, v := range link.Parse(b[4:]) {
			switch typ {
			case ctaStatus:
				if len(v) == 4 {
					status = binary.BigEndian.Uint32(v)
				}
			case ctaTupleOrig:
				del.Bytes(ctaTupleOrig|unix.NLA_F_NESTED, v)
			case ctaZone:
				del.Bytes(ctaZone, v)
			case ctaTupleReply:
				src, proto = tupleSource(v)
			}
		}
		if gone[src] && which(proto, status) { // also what a kernel sends that does not know the filter
			dels = append(dels, link.Message{Type: ctDelete, Body: append([]byte{b[0], unix.NFNETLINK_V0, 0, 0}, del.Encoded()...)})
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
		return 0, fmt.Errorf("forget connections to %v: %w", addrs, err)
	}
	return len(dels), nil
}

// flowsOf asks for the entries of one address, or, since the kernel filters by one only, for all.
func flowsOf(addrs []netip.Addr) link.Message {
	if len(addrs) > 1 {
		return link.Message{Type: ctGet, Body: []byte{unix.AF_UNSPEC, unix.NFNETLINK_V0, 0, 0}}
	}
	family, attr := byte(unix.AF_INET), uint16(ctaV4Src)
	if addrs[0].Is6() {
		family, attr = unix.AF_INET6, ctaV6Src
	}
	var req link.Attrs
	req.Nest(ctaTupleReply, nil, func(t *link.Attrs) {
		t.Nest(ctaTupleIP, nil, func(ip *link.Attrs) { ip.Bytes(attr, addrs[0].AsSlice()) })
	})
	req.Nest(ctaFilter, nil, func(f *link.Attrs) { f.U32(ctaFilterReply, ctaFilterIPSrc) })
	return link.Message{Type: ctGet, Body: append([]byte{family, unix.NFNETLINK_V0, 0, 0}, req.Encoded()...)}
}

// noFlows says that the namespace has no entries; false when it cannot be told.
func (s *Syncer) noFlows() bool {
	_, b, err := s.sock.Get(link.Message{Type: ctGetStats, Body: []byte{unix.AF_UNSPEC, unix.NFNETLINK_V0, 0, 0}})
	if err != nil || len(b) < 4 {
		return false
	}
	for typ, v := range link.Parse(b[4:]) {
		if typ == ctaGlobalEntries && len(v) == 4 {
			return binary.BigEndian.Uint32(v) == 0
		}
	}
	return false
}

func tupleSource(tuple []byte) (src netip.Addr, proto byte) {
	for typ, v := range link.Parse(tuple) {
		for inner, d := range link.Parse(v) {
			switch {
			case typ == ctaTupleIP && (inner == ctaV4Src || inner == ctaV6Src):
				src, _ = netip.AddrFromSlice(d)
			case typ == ctaTupleProto && inner == ctaProtoNum && len(d) == 1:
				proto = d[0]
			}
		}
	}
	return src, proto
}
