package store

import (
	"encoding/binary"
	"encoding/hex"
	"slices"

	"google.golang.org/protobuf/proto"

	"skein/manager/allocator"
	"skein/manager/api"
)

// What is kept aside of a task's row, in this process's memory only: flags, then as they say startAfter, extra (its length and bytes),
// addresses (a count, then form and offset of each), gateway (form and offset), host ports (form), and last the status.
const (
	sideStartAfter = 1 << iota
	sideAddresses
	sideGateway
	sidePorts
	sideStatus
	sideRaw // the status is a message of the log
	sideExtra
)

// side is the decoded form of it.
type side struct {
	flags      byte
	startAfter int64
	extra      []byte // see extraOf
	addresses  []byte // count, form, offset, form, offset ...
	gateway    uint32
	gatewayOff uint32
	ports      uint32
	fixed      []byte // all but flags and status
	status     []byte
}

func readSide(b []byte) (s side) {
	if len(b) == 0 {
		return s
	}
	s.flags = b[0]
	rest := b[1:]
	next := func() uint64 {
		v, n := binary.Uvarint(rest)
		rest = rest[n:]
		return v
	}
	if s.flags&sideStartAfter != 0 {
		s.startAfter = int64(next())
	}
	if s.flags&sideExtra != 0 {
		size := next()
		s.extra, rest = rest[:size], rest[size:]
	}
	if s.flags&sideAddresses != 0 {
		from := rest
		for range 2 * next() {
			next()
		}
		s.addresses = from[:len(from)-len(rest)]
	}
	if s.flags&sideGateway != 0 {
		s.gateway, s.gatewayOff = uint32(next()), uint32(next())
	}
	if s.flags&sidePorts != 0 {
		s.ports = uint32(next())
	}
	s.fixed, s.status = b[1:len(b)-len(rest)], rest
	return s
}

// eachAddress calls f for form and offset of every address.
func (s *side) eachAddress(f func(form, off uint32)) int {
	b := s.addresses
	if len(b) == 0 {
		return 0
	}
	next := func() uint64 {
		v, n := binary.Uvarint(b)
		b = b[n:]
		return v
	}
	count := int(next())
	for range count {
		n := uint32(next())
		f(n, uint32(next()))
	}
	return count
}

// forms calls f for every form the task has.
func (s side) forms(f func(uint32)) {
	s.eachAddress(func(n, _ uint32) { f(n) })
	if s.flags&sideGateway != 0 {
		f(s.gateway)
	}
	if s.flags&sidePorts != 0 {
		f(s.ports)
	}
}

// appendFixed begins a side with what a task waits for and holds.
func (x *formTable) appendFixed(b []byte, startAfter int64, extra []byte, g *allocator.TaskGrant) []byte {
	at := len(b)
	b = append(b, 0)
	if startAfter != 0 {
		b[at] |= sideStartAfter
		b = binary.AppendUvarint(b, uint64(startAfter))
	}
	if len(extra) > 0 {
		b[at] |= sideExtra
		b = append(binary.AppendUvarint(b, uint64(len(extra))), extra...)
	}
	if g == nil {
		return b
	}
	if len(g.Addresses) > 0 {
		b[at] |= sideAddresses
		b = binary.AppendUvarint(b, uint64(len(g.Addresses)))
		for i := range g.Addresses {
			n, off := x.address(&g.Addresses[i])
			b = binary.AppendUvarint(binary.AppendUvarint(b, uint64(n)), uint64(off))
		}
	}
	if g.Gateway4.IsValid() || g.Gateway6.IsValid() {
		b[at] |= sideGateway
		n, off := x.gateway(g.Gateway4, g.Gateway6)
		b = binary.AppendUvarint(binary.AppendUvarint(b, uint64(n)), uint64(off))
	}
	if len(g.HostPorts) > 0 {
		b[at] |= sidePorts
		b = binary.AppendUvarint(b, uint64(x.hostPorts(g.HostPorts)))
	}
	return b
}

// extraOf encodes what few tasks have: those fields of their records that have no place of their own. readExtra decodes it.
func extraOf(r *api.TaskRecord) []byte {
	if r.Restarts == nil {
		return nil
	}
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(&api.TaskRecord{Restarts: r.Restarts})
	if err != nil {
		panic(err) // its strings were decoded from the log, which takes valid ones only
	}
	return b
}

func readExtra(b []byte) *api.TaskRecord {
	r := &api.TaskRecord{}
	if err := proto.Unmarshal(b, r); err != nil {
		panic(err) // it was encoded here
	}
	return r
}

// grant is what the task holds. The slices of g are used again.
func (x *formTable) grant(s side, g *allocator.TaskGrant) {
	*g = allocator.TaskGrant{Addresses: g.Addresses[:0], HostPorts: g.HostPorts[:0]}
	s.eachAddress(func(n, off uint32) { g.Addresses = append(g.Addresses, x.list[n].address(off)) })
	if s.flags&sideGateway != 0 {
		g.Gateway4, g.Gateway6 = x.list[s.gateway].gateway(s.gatewayOff)
	}
	if s.flags&sidePorts != 0 {
		g.HostPorts = append(g.HostPorts, x.list[s.ports].portList...)
	}
}

// Flags of a status that is not a message of the log: those fields that are there, in this order, behind the flags and the time.
const (
	saidKnown   = 1 << iota // the message is one of knownMessages
	saidMessage             // or any other
	saidErr
	saidContainer   // 32 bytes
	saidContainerID // or any text
	saidPid
	saidExit
	saidByNode // the task's node said it
	saidReason
)

// knownMessages are what agents say most. In memory only; the order may change.
var knownMessages = [...]string{"", "started", pendingMessage, "preparing", "starting", "finished", "shutdown", "stopped", "assigned", "ready", "accepted"}

// appendStatus adds what was said of a task, which the report may leave unnamed, to a side. container, if there is one, stands for the report's container id.
func appendStatus(b []byte, row *taskRow, node string, r *api.TaskReport, container []byte) []byte {
	if r == nil {
		return b
	}
	b[0] |= sideStatus
	id, ok := api.ParseID(r.TaskId)
	if (r.TaskId != "" && (!ok || id != row.id())) || r.State != uint32(row.state) || len(r.Ports) > 0 || len(r.ProtoReflect().GetUnknown()) > 0 || (r.NodeId != "" && r.NodeId != node) {
		b[0] |= sideRaw
		out, err := proto.MarshalOptions{Deterministic: true}.MarshalAppend(b, r)
		if err != nil {
			panic(err) // it was decoded from the log or made here, of valid strings
		}
		return out
	}
	at := len(b)
	b = binary.AppendVarint(append(b, 0, 0), r.Time-row.created)
	if r.Reason != "" {
		b[at+1] = saidReason >> 8
		b = appendText(b, r.Reason)
	}
	if r.NodeId != "" {
		b[at] |= saidByNode
	}
	if k := slices.Index(knownMessages[:], r.Message); k > 0 {
		b[at] |= saidKnown
		b = append(b, byte(k))
	} else if k < 0 {
		b[at] |= saidMessage
		b = appendText(b, r.Message)
	}
	if r.Err != "" {
		b[at] |= saidErr
		b = appendText(b, r.Err)
	}
	var raw [32]byte
	switch {
	case len(container) == len(raw):
		b[at] |= saidContainer
		b = append(b, container...)
	case unhex(&raw, r.ContainerId):
		b[at] |= saidContainer
		b = append(b, raw[:]...)
	case r.ContainerId != "":
		b[at] |= saidContainerID
		b = appendText(b, r.ContainerId)
	}
	if r.Pid != 0 {
		b[at] |= saidPid
		b = binary.AppendVarint(b, int64(r.Pid))
	}
	if r.ExitCode != 0 {
		b[at] |= saidExit
		b = binary.AppendVarint(b, int64(r.ExitCode))
	}
	return b
}

func appendText(b []byte, s string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

// unhex reads 64 lower-case hexadecimal digits.
func unhex(out *[32]byte, s string) bool {
	if len(s) != 64 {
		return false
	}
	for i := range out {
		hi, lo := hexDigit(s[2*i]), hexDigit(s[2*i+1])
		if hi > 15 || lo > 15 {
			return false
		}
		out[i] = hi<<4 | lo
	}
	return true
}

func hexDigit(c byte) byte {
	switch {
	case c >= '0' && c <= '9':
		return c - '0'
	case c >= 'a' && c <= 'f':
		return c - 'a' + 10
	}
	return 255
}

// readStatus fills r with what was said. text makes strings out of bytes, hexadecimal ones first.
func readStatus(r *api.TaskReport, s side, row *taskRow, id, node string, text func(hexed, plain []byte) string) error {
	if s.flags&sideRaw != 0 {
		return proto.Unmarshal(s.status, r)
	}
	b := s.status
	flags := int(b[0]) | int(b[1])<<8
	b = b[2:]
	varint := func() int64 {
		v, n := binary.Varint(b)
		b = b[n:]
		return v
	}
	str := func() string {
		size, n := binary.Uvarint(b)
		v := b[n : n+int(size)]
		b = b[n+int(size):]
		return text(nil, v)
	}
	r.TaskId, r.State, r.Time = id, uint32(row.state), varint()+row.created
	if flags&saidReason != 0 {
		r.Reason = str()
	}
	if flags&saidByNode != 0 {
		r.NodeId = node
	}
	if flags&saidKnown != 0 {
		r.Message = knownMessages[b[0]]
		b = b[1:]
	}
	if flags&saidMessage != 0 {
		r.Message = str()
	}
	if flags&saidErr != 0 {
		r.Err = str()
	}
	if flags&saidContainer != 0 {
		r.ContainerId = text(b[:32], nil)
		b = b[32:]
	}
	if flags&saidContainerID != 0 {
		r.ContainerId = str()
	}
	if flags&saidPid != 0 {
		r.Pid = int32(varint())
	}
	if flags&saidExit != 0 {
		r.ExitCode = int32(varint())
	}
	return nil
}

func plainText(hexed, plain []byte) string {
	if len(hexed) > 0 {
		return hex.EncodeToString(hexed)
	}
	return string(plain)
}
