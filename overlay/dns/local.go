package dns

import (
	"math/rand/v2"
	"net/netip"
	"strconv"
	"strings"

	"github.com/miekg/dns"
)

const (
	ttlStable   = 30 // seconds: VIPs keep their address
	ttlEndpoint = 2  // containers, tasks.NAME and round robin: caches must not pin the dead
	ttlNegative = 1
)

// Answer is what a question about a name gets without asking anybody else; false: it would be passed on.
func (v *View) Answer(name string, typ uint16) (*dns.Msg, bool) {
	m := new(dns.Msg).SetQuestion(dns.Fqdn(name), typ)
	ok := local(m, v, m.Question[0])
	return m, ok
}

// local answers m if the question is about names of the view; it tells whether it did.
func local(m *dns.Msg, v *View, q dns.Question) bool {
	m.Authoritative = true
	name := canonical(q.Name)
	if a, ok := reverseAddr(name); ok {
		return reverse(m, v, q, a)
	}
	z, r, ok := v.find(name)
	if ok {
		answerAddrs(m, q, r)
		return true
	}
	if port, proto, rest, ok := serviceName(name); ok {
		if z, r, ok = v.find(rest); ok {
			answerService(m, q, z, r, port, proto, rest)
			return true
		}
		name = rest
	}
	if strings.Contains(name, ".") || name == "" || v.Bare {
		return false
	}
	m.Rcode = dns.RcodeNameError
	m.Ns = negative(q.Name)
	return true
}

func reverse(m *dns.Msg, v *View, q dns.Question, a netip.Addr) bool {
	p, known := v.reverse(a)
	switch {
	case !known:
		return false
	case p.name == "":
		m.Rcode = dns.RcodeNameError
		m.Ns = negative(q.Name)
	case q.Qtype == dns.TypePTR || q.Qtype == dns.TypeANY:
		m.Answer = []dns.RR{&dns.PTR{Hdr: header(q.Name, dns.TypePTR, ttl(p.stable)), Ptr: dns.Fqdn(p.name)}}
	default:
		m.Ns = negative(q.Name)
	}
	return true
}

// answerAddrs answers with a name's addresses in random order.
func answerAddrs(m *dns.Msg, q dns.Question, r Record) {
	start := 0
	if n := len(r.Addrs); n > 1 {
		start = rand.IntN(n)
	}
	for i := range r.Addrs {
		a := r.Addrs[(start+i)%len(r.Addrs)]
		if t := addrType(a); q.Qtype == t || q.Qtype == dns.TypeANY {
			m.Answer = append(m.Answer, addrRecord(q.Name, a, ttl(r.Stable)))
		}
	}
	if len(m.Answer) == 0 {
		m.Ns = negative(q.Name)
	}
	rand.Shuffle(len(m.Answer), func(i, j int) { m.Answer[i], m.Answer[j] = m.Answer[j], m.Answer[i] })
}

// serviceName reads _PORT._PROTOCOL.NAME.
func serviceName(name string) (port, proto, rest string, ok bool) {
	port, rest, ok = strings.Cut(name, ".")
	if !ok || len(port) < 2 || port[0] != '_' {
		return "", "", "", false
	}
	proto, rest, ok = strings.Cut(rest, ".")
	if !ok || proto != "_tcp" && proto != "_udp" && proto != "_sctp" {
		return "", "", "", false
	}
	return port[1:], proto[1:], rest, true
}

// answerService answers an SRV query. A port is one that the service names, or a plain number. What has one stable address is one target,
// known by the name that was asked; else each address is one, known by its own name.
func answerService(m *dns.Msg, q dns.Question, z *Zone, r Record, port, proto, name string) {
	number, ok := r.port(port, proto)
	if !ok {
		m.Rcode = dns.RcodeNameError
	}
	if !ok || q.Qtype != dns.TypeSRV && q.Qtype != dns.TypeANY {
		m.Ns = negative(q.Name)
		return
	}
	full := name
	if short, cut := strings.CutSuffix(name, z.suffix); !cut || z.names[short].Addrs == nil {
		full = name + z.suffix
	}
	listed := map[string]bool{}
	for _, a := range r.Addrs {
		target := full
		if p := z.ptr[a]; !r.Stable && p.name != "" {
			target = p.name
		}
		target = dns.Fqdn(target)
		if !listed[target] {
			listed[target] = true
			m.Answer = append(m.Answer, &dns.SRV{Hdr: header(q.Name, dns.TypeSRV, ttl(r.Stable)), Weight: 1, Port: number, Target: target})
		}
		m.Extra = append(m.Extra, addrRecord(target, a, ttl(r.Stable)))
	}
	if len(m.Answer) == 0 {
		m.Ns = negative(q.Name)
	}
	rand.Shuffle(len(m.Answer), func(i, j int) { m.Answer[i], m.Answer[j] = m.Answer[j], m.Answer[i] })
}

// port resolves a port of an SRV query.
func (r Record) port(name, proto string) (uint16, bool) {
	for _, p := range r.Ports {
		if p.Protocol == proto && canonical(p.Name) == name {
			return p.Number, true
		}
	}
	n, err := strconv.ParseUint(name, 10, 16)
	return uint16(n), err == nil && n > 0
}

func ttl(stable bool) uint32 {
	if stable {
		return ttlStable
	}
	return ttlEndpoint
}

func addrType(a netip.Addr) uint16 {
	if a.Is4() {
		return dns.TypeA
	}
	return dns.TypeAAAA
}

func addrRecord(name string, a netip.Addr, ttl uint32) dns.RR {
	if a.Is4() {
		return &dns.A{Hdr: header(name, dns.TypeA, ttl), A: a.AsSlice()}
	}
	return &dns.AAAA{Hdr: header(name, dns.TypeAAAA, ttl), AAAA: a.AsSlice()}
}

func header(name string, typ uint16, ttl uint32) dns.RR_Header {
	return dns.RR_Header{Name: name, Rrtype: typ, Class: dns.ClassINET, Ttl: ttl}
}

// negative is the SOA that lets caches forget a negative answer soon.
func negative(name string) []dns.RR {
	return []dns.RR{&dns.SOA{Hdr: header(name, dns.TypeSOA, ttlNegative), Ns: "skein.", Mbox: "skein.", Minttl: ttlNegative, Refresh: 60, Retry: 60, Expire: 60}}
}

// reverseAddr reads canonical names under in-addr.arpa and ip6.arpa.
func reverseAddr(name string) (netip.Addr, bool) {
	if rest, ok := strings.CutSuffix(name, ".in-addr.arpa"); ok {
		parts := strings.Split(rest, ".")
		if len(parts) != 4 {
			return netip.Addr{}, false
		}
		a, err := netip.ParseAddr(parts[3] + "." + parts[2] + "." + parts[1] + "." + parts[0])
		return a, err == nil
	}
	rest, ok := strings.CutSuffix(name, ".ip6.arpa")
	if !ok {
		return netip.Addr{}, false
	}
	parts := strings.Split(rest, ".")
	if len(parts) != 32 {
		return netip.Addr{}, false
	}
	var b [16]byte
	for i, p := range parts {
		n, err := strconv.ParseUint(p, 16, 4)
		if err != nil {
			return netip.Addr{}, false
		}
		at := 31 - i
		b[at/2] |= byte(n) << (4 * (1 - at%2))
	}
	return netip.AddrFrom16(b), true
}
