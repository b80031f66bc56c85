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
	ctaProtoinfo     = 4
	ctaProtoinfoTCP  = 1
	ctaTCPState      = 1
	ctEstablishedTCP = 3
	ctCloseWaitTCP   = 5
	ctaZone          = 18
	ctaFilter        = 25
	ctaTupleIP       = 1
	ctaTupleProto    = 2
	ctaV4Src         = 1
	ctaV4Dst         = 2
	ctaV6Src         = 3
	ctaV6Dst         = 4
	ctaProtoNum      = 1
	ctaSrcPort       = 2
	ctaDstPort       = 3
	ctaFilterReply   = 2
	ctaFilterIPSrc   = 1
	ctaGlobalEntries = 1
	ctSeenReply      = 1 << 1 // in ctaStatus
)

// Flow is a connection tracking entry: who asked whom, and who answers.
type Flow struct {
	Protocol       byte
	Client, Server netip.AddrPort // as the client knows them
	Backend        netip.Addr
	Answered       bool // the backend has answered at least once
	Open           bool // of TCP: neither side has reset it, nor have both closed it
}

// Dealt reports whether the client knows the backend by another address.
func (f Flow) Dealt() bool { return f.Server.Addr() != f.Backend }

// ForgetFlows deletes the connection tracking entries whose answers come from one of addrs, so that clients of something that is gone are
// refused or dealt anew instead of waiting for ever. With protocol not zero only entries of that protocol.
func (s *Syncer) ForgetFlows(protocol byte, addrs ...netip.Addr) (int, error) {
	ended, err := s.EndFlows(func(f Flow) bool { return protocol == 0 || f.Protocol == protocol }, addrs...)
	return len(ended), err
}

// EndFlows deletes those entries that which is true for, of the ones whose answers come from one of addrs, and returns them.
//
// The kernel's table is one for all namespaces, and looking through it takes milliseconds even when it is empty: the namespace's entries
// are counted first, and any number of addresses is looked for at once.
func (s *Syncer) EndFlows(which func(Flow) bool, addrs ...netip.Addr) ([]Flow, error) {
	if len(addrs) == 0 {
		return nil, nil
	}
	gone := make(map[netip.Addr]bool, len(addrs))
	for _, a := range addrs {
		gone[a] = true
	}
	// The kernel may not know the filter.
	return s.endFlows(flowsOf(addrs), func(f Flow) bool { return gone[f.Backend] && which(f) })
}

// EndAnyFlows is EndFlows for entries of all backends.
func (s *Syncer) EndAnyFlows(which func(Flow) bool) ([]Flow, error) {
	return s.endFlows(allFlows(), which)
}

func (s *Syncer) endFlows(req link.Message, which func(Flow) bool) ([]Flow, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.noFlows() {
		return nil, nil
	}
	var dels []link.Message
	var ended []Flow
	err := s.sock.Dump(req, func(_ uint16, b []byte) error {
		f, del := parseFlow(b)
		if which(f) {
			ended, dels = append(ended, f), append(dels, del)
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
		return nil, fmt.Errorf("end connections: %w", err)
	}
	return ended, nil
}

// parseFlow reads an entry of a dump, and makes the message that deletes it.
func parseFlow(b []byte) (f Flow, del link.Message) {
	var id link.Attrs
	f.Answered = true // the kernel tells the status always
	for typ, v := range link.Parse(b[4:]) {
		switch typ {
		case ctaStatus:
			f.Answered = len(v) != 4 || binary.BigEndian.Uint32(v)&ctSeenReply != 0
		case ctaTupleOrig:
			id.Bytes(ctaTupleOrig|unix.NLA_F_NESTED, v)
			f.Client, f.Server, f.Protocol = tuple(v)
		case ctaProtoinfo:
			f.Open = isOpen(v)
		case ctaZone:
			id.Bytes(ctaZone, v)
		case ctaTupleReply:
			answers, _, _ := tuple(v)
			f.Backend = answers.Addr()
		}
	}
	return f, link.Message{Type: ctDelete, Body: append([]byte{b[0], unix.NFNETLINK_V0, 0, 0}, id.Encoded()...)}
}

// isOpen reads the state of TCP: ESTABLISHED, FIN_WAIT or CLOSE_WAIT.
func isOpen(info []byte) bool {
	for typ, v := range link.Parse(info) {
		for inner, d := range link.Parse(v) {
			if typ == ctaProtoinfoTCP && inner == ctaTCPState && len(d) == 1 {
				return d[0] >= ctEstablishedTCP && d[0] <= ctCloseWaitTCP
			}
		}
	}
	return false
}

func allFlows() link.Message {
	return link.Message{Type: ctGet, Body: []byte{unix.AF_UNSPEC, unix.NFNETLINK_V0, 0, 0}}
}

// flowsOf asks for the entries of one address, or, since the kernel filters by one only, for all.
func flowsOf(addrs []netip.Addr) link.Message {
	if len(addrs) > 1 {
		return allFlows()
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

// tuple reads one direction of an entry; ports of protocols without are zero.
func tuple(b []byte) (src, dst netip.AddrPort, proto byte) {
	var from, to netip.Addr
	var sport, dport uint16
	for typ, v := range link.Parse(b) {
		for inner, d := range link.Parse(v) {
			switch {
			case typ == ctaTupleIP && (inner == ctaV4Src || inner == ctaV6Src):
				from, _ = netip.AddrFromSlice(d)
			case typ == ctaTupleIP && (inner == ctaV4Dst || inner == ctaV6Dst):
				to, _ = netip.AddrFromSlice(d)
			case typ == ctaTupleProto && inner == ctaProtoNum && len(d) == 1:
				proto = d[0]
			case typ == ctaTupleProto && inner == ctaSrcPort && len(d) == 2:
				sport = binary.BigEndian.Uint16(d)
			case typ == ctaTupleProto && inner == ctaDstPort && len(d) == 2:
				dport = binary.BigEndian.Uint16(d)
			}
		}
	}
	return netip.AddrPortFrom(from, sport), netip.AddrPortFrom(to, dport), proto
}
