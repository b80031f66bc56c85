package link

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"

	"golang.org/x/sys/unix"
)

// classOf finds the kind of object that a request is about, and whether it is to be removed.
func classOf(m Message) (cl *class, remove bool) {
	switch m.Type {
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		return routeClass(), m.Type == unix.RTM_DELROUTE
	case unix.RTM_NEWADDR, unix.RTM_DELADDR:
		return addrClass(), m.Type == unix.RTM_DELADDR
	case unix.RTM_NEWRULE, unix.RTM_DELRULE:
		return ruleClass(), m.Type == unix.RTM_DELRULE
	case unix.RTM_NEWNEIGH, unix.RTM_DELNEIGH:
		if len(m.Body) > 0 && m.Body[0] == unix.AF_BRIDGE {
			return fdbClass(), m.Type == unix.RTM_DELNEIGH
		}
		return neighClass(), m.Type == unix.RTM_DELNEIGH
	}
	return nil, false
}

func routeClass() *class {
	return &class{kind: "route", header: unix.SizeofRtMsg, typ: unix.RTM_NEWROUTE,
		list: func(o object) Message {
			body := make([]byte, unix.SizeofRtMsg)
			body[0], body[5] = o.body[0], o.body[5]
			return Message{Type: unix.RTM_GETROUTE, Body: body}
		},
		key: func(o object) string {
			table := uint32(o.body[4])
			if t, ok := o.attrs[unix.RTA_TABLE]; ok {
				table = u32(t)
			}
			return fmt.Sprintf("%d %d/%d %x %d", o.body[0], o.body[5], o.body[1], o.attrs[unix.RTA_DST], table)
		},
		same: func(want, have object) bool { // IPv6 has no scopes
			return want.body[7] == have.body[7] && (want.body[0] == unix.AF_INET6 || want.body[6] == have.body[6])
		},
		inKey: map[uint16]bool{unix.RTA_DST: true, unix.RTA_TABLE: true},
		name: func(w *watch, c *Conn, o object) string {
			k, r := parseRoute(o.body)
			s := k.Dst.String()
			if r.Local {
				s = "local " + s
			}
			if r.Via.IsValid() {
				s += " via " + r.Via.String()
			}
			if r.Dev != 0 {
				s += " dev " + w.device(c, r.Dev)
			}
			if k.Table != 0 {
				s += fmt.Sprintf(" table %#x", k.Table)
			}
			if r.Src.IsValid() {
				s += " src " + r.Src.String()
			}
			return s
		}}
}

func addrClass() *class {
	return &class{kind: "address", header: unix.SizeofIfAddrmsg, typ: unix.RTM_NEWADDR,
		list: func(o object) Message {
			body := make([]byte, unix.SizeofIfAddrmsg)
			body[0] = o.body[0]
			return Message{Type: unix.RTM_GETADDR, Body: body}
		},
		key: func(o object) string {
			local := o.attrs[unix.IFA_LOCAL]
			if local == nil {
				local = o.attrs[unix.IFA_ADDRESS]
			}
			return fmt.Sprintf("%d %x/%d", u32(o.body[4:]), local, o.body[1])
		},
		same:  func(object, object) bool { return true },
		inKey: map[uint16]bool{unix.IFA_LOCAL: true, unix.IFA_ADDRESS: true, unix.IFA_FLAGS: true, unix.IFA_CACHEINFO: true, unix.IFA_BROADCAST: true, unix.IFA_LABEL: true},
		name: func(w *watch, c *Conn, o object) string {
			a, _ := netip.AddrFromSlice(o.attrs[unix.IFA_LOCAL])
			if !a.IsValid() {
				a, _ = netip.AddrFromSlice(o.attrs[unix.IFA_ADDRESS])
			}
			return fmt.Sprintf("%s/%d dev %s", a, o.body[1], w.device(c, int(u32(o.body[4:]))))
		}}
}

func ruleClass() *class {
	return &class{kind: "rule", header: unix.SizeofRtMsg, typ: unix.RTM_NEWRULE,
		list: func(o object) Message {
			body := make([]byte, unix.SizeofRtMsg)
			body[0] = o.body[0]
			return Message{Type: unix.RTM_GETRULE, Body: body}
		},
		key: func(o object) string {
			return fmt.Sprintf("%d %x %x/%x %x %x", o.body[0], o.attrs[unix.FRA_PRIORITY], o.attrs[unix.FRA_FWMARK], o.attrs[unix.FRA_FWMASK],
				o.attrs[unix.FRA_PROTOCOL], u32(o.body[8:])&unix.FIB_RULE_INVERT)
		},
		same: func(want, have object) bool { return want.body[7] == have.body[7] },
		name: func(_ *watch, _ *Conn, o object) string {
			k, r, _ := parseRule(o.body)
			var s strings.Builder
			fmt.Fprintf(&s, "%d:", k.Pref)
			if o.body[0] == unix.AF_INET6 {
				s.WriteString(" ipv6")
			}
			if k.Not {
				s.WriteString(" not")
			}
			if k.Mask != 0 {
				fmt.Fprintf(&s, " fwmark %#x/%#x", k.Mark, k.Mask)
			}
			switch {
			case r.Goto != 0:
				fmt.Fprintf(&s, " goto %d", r.Goto)
			case r.Table != 0:
				fmt.Fprintf(&s, " lookup %#x", r.Table)
			default:
				s.WriteString(" nop")
			}
			return s.String()
		}}
}

func neighClass() *class {
	return &class{kind: "neighbour", header: sizeofNdMsg, typ: unix.RTM_NEWNEIGH,
		list: func(o object) Message {
			return Message{Type: unix.RTM_GETNEIGH, Body: ndmsg(o.body[0], 0, 0, o.body[10]&unix.NTF_PROXY)}
		},
		key: func(o object) string { return fmt.Sprintf("%d %x", u32(o.body[4:]), o.attrs[unix.NDA_DST]) },
		same: func(want, have object) bool {
			w, h := binary.NativeEndian.Uint16(want.body[8:]), binary.NativeEndian.Uint16(have.body[8:])
			return w&^h&unix.NUD_PERMANENT == 0
		},
		inKey: map[uint16]bool{unix.NDA_DST: true},
		name: func(w *watch, c *Conn, o object) string {
			a, _ := netip.AddrFromSlice(o.attrs[unix.NDA_DST])
			return fmt.Sprintf("%s dev %s%s", a, w.device(c, int(u32(o.body[4:]))), station(o))
		}}
}

func fdbClass() *class {
	return &class{kind: "forwarding entry", header: sizeofNdMsg, typ: unix.RTM_NEWNEIGH,
		list: func(o object) Message {
			return Message{Type: unix.RTM_GETNEIGH, Body: ndmsg(unix.AF_BRIDGE, int(u32(o.body[4:])), 0, 0)}
		},
		key:   func(o object) string { return fmt.Sprintf("%d %x", u32(o.body[4:]), o.attrs[unix.NDA_LLADDR]) },
		same:  func(object, object) bool { return true },
		inKey: map[uint16]bool{unix.NDA_LLADDR: true},
		name: func(w *watch, c *Conn, o object) string {
			a, _ := netip.AddrFromSlice(o.attrs[unix.NDA_DST])
			return fmt.Sprintf("%s dev %s to %s", strings.TrimPrefix(station(o), " lladdr "), w.device(c, int(u32(o.body[4:]))), a)
		}}
}

func station(o object) string {
	v := o.attrs[unix.NDA_LLADDR]
	if len(v) != 6 {
		return ""
	}
	return " lladdr " + MAC(v).String()
}

// links lists devices by index and by name.
func (w *watch) links(c *Conn) (map[string][]object, error) {
	cl := &class{header: unix.SizeofIfInfomsg, typ: unix.RTM_NEWLINK,
		list: func(object) Message { return Message{Type: unix.RTM_GETLINK, Body: ifinfo(0, 0, 0)} },
		key:  func(o object) string { return fmt.Sprint(u32(o.body[4:])) }}
	if _, err := w.list(c, cl, object{body: ifinfo(0, 0, 0)}); err != nil {
		return nil, err
	}
	req := cl.list(object{})
	return w.objects[fmt.Sprintf("%d %x", req.Type, req.Body)], nil
}

// device is a device's name, or its number when it has gone.
func (w *watch) device(c *Conn, index int) string {
	all, err := w.links(c)
	if err == nil {
		for _, l := range all[fmt.Sprint(index)] {
			return cString(l.attrs[unix.IFLA_IFNAME])
		}
	}
	return fmt.Sprintf("#%d", index)
}

// findLink looks for the device that a request names by index or by name.
func (w *watch) findLink(c *Conn, want object) (name string, have object, found bool, err error) {
	all, err := w.links(c)
	if err != nil {
		return "", object{}, false, err
	}
	if index := u32(want.body[4:]); index != 0 {
		for _, l := range all[fmt.Sprint(index)] {
			return cString(l.attrs[unix.IFLA_IFNAME]), l, true, nil
		}
		return fmt.Sprintf("#%d", index), object{}, false, nil
	}
	name = cString(want.attrs[unix.IFLA_IFNAME])
	for _, list := range all {
		for _, l := range list {
			if cString(l.attrs[unix.IFLA_IFNAME]) == name {
				return name, l, true, nil
			}
		}
	}
	return name, object{}, false, nil
}

// compareLink is compare for devices, which are listed with more than they were made with, and otherwise.
func (w *watch) compareLink(c *Conn, m Message) (changes bool, err error) {
	want := newObject(m.Body, unix.SizeofIfInfomsg)
	name, have, found, err := w.findLink(c, want)
	if err != nil {
		return false, err
	}
	switch {
	case m.Type == unix.RTM_DELLINK:
		if found && !w.deleted[name] {
			w.deleted[name] = true
			w.audit.Add("device", name, "surplus, or not as it should be")
		}
		return found || want.attrs[unix.IFLA_IFNAME] == nil, nil
	case m.Flags&unix.NLM_F_CREATE != 0:
		if !w.deleted[name] { // else it was named already, and is made anew
			w.audit.Add("device", name, "missing")
		}
		return true, nil
	case !found:
		return true, nil // the kernel says so, or a dry audit has found before that it is missing
	}
	state := ""
	flags, change := u32(want.body[8:]), u32(want.body[12:])
	if is := u32(have.body[8:]); (is^flags)&change != 0 {
		state = fmt.Sprintf("differs: flags are %#x, want %#x of %#x", is&change, flags&change, change)
		if change&unix.IFF_UP != 0 {
			state = "differs: it is down"
		}
	}
	for t, v := range want.attrs {
		if s := differsLink(t, v, have); s != "" {
			state = s
		}
	}
	if state == "" {
		return false, nil
	}
	w.audit.Add("device", name, state)
	return true, nil
}

// differsLink says how an attribute of a device differs; empty when it does not.
func differsLink(t uint16, want []byte, have object) string {
	switch t {
	case unix.IFLA_IFNAME:
		return ""
	case unix.IFLA_PROTINFO: // of a bridge's port; listed as data of its kind
		t = unix.IFLA_LINKINFO
		var port Attrs
		port.Bytes(unix.IFLA_INFO_SLAVE_DATA, want)
		want = port.b
	}
	is := have.attrs[t]
	if sameAttr(want, is) {
		return ""
	}
	if t == unix.IFLA_LINKINFO {
		return "differs: its settings are not as they should be"
	}
	names := map[uint16]string{unix.IFLA_MTU: "MTU", unix.IFLA_MASTER: "bridge", unix.IFLA_ADDRESS: "address", unix.IFLA_IFALIAS: "alias"}
	what, known := names[t]
	if !known {
		what = fmt.Sprintf("attribute %d", t)
	}
	switch t {
	case unix.IFLA_MTU, unix.IFLA_MASTER:
		return fmt.Sprintf("differs: %s is %d, want %d", what, u32(is), u32(want))
	case unix.IFLA_IFALIAS:
		return fmt.Sprintf("differs: %s is %q, want %q", what, cString(is), cString(want))
	}
	return fmt.Sprintf("differs: %s is %x, want %x", what, is, want)
}
