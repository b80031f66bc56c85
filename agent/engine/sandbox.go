package engine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"

	"skein/overlay"
)

const (
	firstDynamicPort = 32768
	lastDynamicPort  = 60999
)

// endpointSettings checks the wished networks when a container is created.
func (e *Engine) endpointSettings(hc *container.HostConfig, nc *network.NetworkingConfig) (map[string]*network.EndpointSettings, error) {
	mode := string(hc.NetworkMode)
	if mode == "" || mode == "default" {
		mode = defaultBridge
		hc.NetworkMode = container.NetworkMode(mode)
	}
	if target, ok := strings.CutPrefix(mode, "container:"); ok {
		if _, err := e.findJoined(target); err != nil {
			return nil, err
		}
		if len(hc.PortBindings) > 0 {
			return nil, invalid("conflicting options: port publishing and the container type network mode")
		}
		return map[string]*network.EndpointSettings{}, nil
	}
	wished := map[string]*network.EndpointSettings{mode: {}}
	if nc != nil {
		for name, s := range nc.EndpointsConfig {
			if s == nil {
				s = &network.EndpointSettings{}
			}
			if name == "default" {
				name = mode
			}
			wished[name] = s
		}
	}
	out := map[string]*network.EndpointSettings{}
	for name, s := range wished {
		if cluster, settings, err := e.clusterEndpoint(name, s); err != nil {
			return nil, err
		} else if cluster != "" {
			out[cluster] = settings
			continue
		}
		l, err := e.nets.find(name)
		if err != nil {
			return nil, err
		}
		if (l.Driver == "host" || l.Driver == "null") && len(wished) > 1 {
			return nil, invalid("container cannot be connected to network %s and others at once", l.Name)
		}
		if out[l.Name], err = endpoint(l, s); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// endpoint checks what a user wishes of one network and keeps it.
func endpoint(l *localNetwork, s *network.EndpointSettings) (*network.EndpointSettings, error) {
	if len(s.MacAddress) > 0 {
		return nil, notBuilt("--mac-address is not supported by this version of skein")
	}
	if len(s.Links) > 0 || len(s.DriverOpts) > 0 {
		return nil, notBuilt("links and driver options of an endpoint are not supported by this version of skein: use --network-alias")
	}
	if l.Name == defaultBridge && len(s.Aliases) > 0 {
		return nil, invalid("network-scoped alias is supported only for containers in user defined networks")
	}
	if c := s.IPAMConfig; c != nil {
		if c.IPv6Address.IsValid() || len(c.LinkLocalIPs) > 0 {
			return nil, notBuilt("IPv6 and link-local addresses on bridge networks are not supported by this version of skein")
		}
		if c.IPv4Address.IsValid() && (l.Name == defaultBridge || l.Driver != "bridge") {
			return nil, invalid("user specified IP address is supported on user defined networks only")
		}
	}
	return &network.EndpointSettings{NetworkID: l.ID, Aliases: s.Aliases, IPAMConfig: s.IPAMConfig, GwPriority: s.GwPriority}, nil
}

// sharesNetwork returns the container whose network r joins, or nil.
func (e *Engine) sharesNetwork(r record) (*entry, error) {
	target, ok := strings.CutPrefix(string(r.HostConfig.NetworkMode), "container:")
	if !ok || r.Task != "" {
		return nil, nil
	}
	return e.find(target)
}

// networkFilesDir is where the container's hosts, hostname and resolv.conf are: with the container whose network it shares.
func (e *Engine) networkFilesDir(r record) string {
	if o, err := e.sharesNetwork(r); err == nil && o != nil {
		return e.networkFilesDir(o.snapshot()) // ends: a container can only join one that was created before
	}
	return e.containerDir(r.ID)
}

// connect makes the container's network namespace and returns its path; empty means the node's own. Before it makes anything it records
// that there is something to clean, together with the addresses: one write.
func (e *Engine) connect(ctx context.Context, c *entry) (string, error) {
	r := c.snapshot()
	o, err := e.sharesNetwork(r)
	if err != nil {
		return "", err
	}
	if host := r.HostConfig.NetworkMode == "host"; host || o != nil || r.Task != "" {
		if err := e.update(c, func(r *record) { r.State.Clean = false }); err != nil || host {
			return "", err
		}
		if o != nil {
			return e.joinNetwork(ctx, o)
		}
		return e.cfg.Network.AddSandbox(ctx, r.Sandbox)
	}
	sb, nets, err := e.bridgeSandbox(r)
	if attached := len(onCluster(r)) > 0; attached && err == nil {
		defer e.settled(r.ID)
		err = e.place(ctx, r, &sb, nets)
	}
	if err == nil {
		err = e.update(c, func(r *record) { r.State.Clean, r.Sandbox, r.Networks, r.Attached = false, sb, nets, len(sb.Legs) > 0 })
	}
	if err != nil {
		e.releaseBridges(r)
		return "", err
	}
	return e.cfg.Network.AddSandbox(ctx, sb)
}

// joinNetwork returns the namespace of a running container by its own name, not by a pid that may be another's by the time it is opened.
func (e *Engine) joinNetwork(ctx context.Context, o *entry) (string, error) {
	r := o.snapshot()
	if !r.State.active() {
		return "", conflict("cannot join network of a non running container: %s", r.ID)
	}
	next, err := e.sharesNetwork(r)
	switch {
	case err != nil:
		return "", err
	case next != nil:
		return e.joinNetwork(ctx, next)
	case r.HostConfig.NetworkMode == "host":
		return "", nil
	}
	return e.cfg.Network.AddSandbox(ctx, r.Sandbox) // idempotent
}

// bridgeSandbox allocates addresses and ports on the container's single-host networks.
func (e *Engine) bridgeSandbox(r record) (overlay.Sandbox, map[string]*network.EndpointSettings, error) {
	sb := overlay.Sandbox{ID: r.ID, SearchDNS: r.HostConfig.DNSSearch}
	nets := map[string]*network.EndpointSettings{}
	for _, d := range r.HostConfig.DNS {
		sb.Upstreams = append(sb.Upstreams, netip.AddrPortFrom(d, 53))
	}
	ports, err := e.publish(r)
	if err != nil {
		return sb, nil, err
	}
	for _, name := range sortedKeys(r.Networks) {
		s := *r.Networks[name]
		if clusterID(s.NetworkID) {
			continue // see place
		}
		l, err := e.nets.find(s.NetworkID)
		if err != nil {
			return sb, nil, err
		}
		if l.Driver == "null" {
			nets[name] = &s
			continue
		}
		leg, settings, err := e.bridgeLeg(r, s)
		if err != nil {
			return sb, nil, err
		}
		sb.DNS = sb.DNS || len(leg.Names) > 0
		if len(sb.Bridges) == 0 {
			leg.Ports = ports
		}
		sb.Bridges, nets[name] = append(sb.Bridges, leg), settings
	}
	sb.DNS = sb.DNS || len(sb.Bridges) > 0 && needsForwarder(r)
	return sb, nets, nil
}

// bridgeLeg allocates the container's address on one network. Names are answered on networks that users made.
func (e *Engine) bridgeLeg(r record, s network.EndpointSettings) (overlay.BridgeLeg, *network.EndpointSettings, error) {
	l, err := e.nets.find(s.NetworkID)
	if err != nil {
		return overlay.BridgeLeg{}, nil, err
	}
	var want netip.Addr
	if s.IPAMConfig != nil {
		want = s.IPAMConfig.IPv4Address
	}
	addr, err := e.nets.take(l, r.ID, want)
	if err != nil {
		return overlay.BridgeLeg{}, nil, err
	}
	leg := overlay.BridgeLeg{BridgeID: l.ID, Addr4: addr}
	if l.Name != defaultBridge {
		leg.Names = dnsNames(r, s.Aliases)
	}
	s.EndpointID, s.Gateway, s.IPAddress, s.IPPrefixLen, s.DNSNames = r.ID, l.Gateway, addr.Addr(), addr.Bits(), leg.Names
	return leg, &s, nil
}

func (e *Engine) releaseBridges(r record) {
	e.ports.release(r.ID)
	for _, s := range r.Networks {
		e.nets.give(s.NetworkID, r.ID)
	}
}

// disconnect removes the sandbox and releases its addresses. Idempotent.
func (e *Engine) disconnect(ctx context.Context, c *entry) error {
	r := c.snapshot()
	if r.HostConfig.NetworkMode == "host" || strings.HasPrefix(string(r.HostConfig.NetworkMode), "container:") {
		return nil
	}
	if err := e.cfg.Network.RemoveSandbox(ctx, r.ID); err != nil {
		return err
	}
	if r.Task != "" {
		return nil
	}
	e.releaseBridges(r)
	return nil
}

// disconnected forgets the addresses of the run; those of a task are its own for good.
func disconnected(r *record) {
	if r.Task != "" || r.HostConfig.NetworkMode == "host" || r.HostConfig.NetworkMode.IsContainer() {
		return
	}
	nets := map[string]*network.EndpointSettings{}
	for name, s := range r.Networks {
		nets[name] = &network.EndpointSettings{NetworkID: s.NetworkID, Aliases: s.Aliases, IPAMConfig: s.IPAMConfig}
	}
	r.Networks, r.Sandbox = nets, overlay.Sandbox{}
}

// publish chooses host ports for the container's bindings.
func (e *Engine) publish(r record) ([]overlay.HostPort, error) {
	var out []overlay.HostPort
	bindings := network.PortMap{}
	for p, b := range r.HostConfig.PortBindings {
		if len(b) == 0 {
			b = []network.PortBinding{{}}
		}
		bindings[p] = b
	}
	if r.HostConfig.PublishAllPorts {
		for p := range r.Config.ExposedPorts {
			if _, ok := bindings[p]; !ok {
				bindings[p] = []network.PortBinding{{}}
			}
		}
	}
	for _, p := range sortedPorts(bindings) {
		for _, b := range bindings[p] {
			proto := string(p.Proto())
			if proto != "tcp" && proto != "udp" {
				return nil, notBuilt("publishing %s ports is not supported by this version of skein", proto)
			}
			n, err := e.hostPort(r.ID, proto, b.HostPort)
			if err != nil {
				return nil, fmt.Errorf("driver failed programming external connectivity on endpoint %s: %w", r.Name, err)
			}
			ip := b.HostIP
			if ip.IsValid() && ip.IsUnspecified() {
				ip = netip.Addr{}
			}
			out = append(out, overlay.HostPort{HostIP: ip, Published: n, Target: p.Num(), Protocol: proto})
		}
	}
	return out, nil
}

type portKey struct {
	proto string
	port  uint16
}

// portTable is which container holds which port of the node, so that two that start at once cannot get the same.
type portTable struct {
	mu     sync.Mutex
	holder map[portKey]string
}

func newPortTable() *portTable { return &portTable{holder: map[portKey]string{}} }

// reserve reports whether the container got the port.
func (t *portTable) reserve(k portKey, id string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, taken := t.holder[k]; taken {
		return false
	}
	t.holder[k] = id
	return true
}

func (t *portTable) free(k portKey) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.holder, k)
}

func (t *portTable) release(id string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	maps.DeleteFunc(t.holder, func(_ portKey, holder string) bool { return holder == id })
}

// hostPort reserves the wished port or one of the range, or finds a free one.
func (e *Engine) hostPort(id, proto, wish string) (uint16, error) {
	first, last := firstDynamicPort, lastDynamicPort
	if wish != "" && wish != "0" {
		lo, hi, isRange := strings.Cut(wish, "-")
		var err error
		if first, err = strconv.Atoi(lo); err == nil {
			last = first
			if isRange {
				last, err = strconv.Atoi(hi)
			}
		}
		if err != nil || first < 1 || last > 65535 || last < first {
			return 0, invalid("invalid host port %q", wish)
		}
	}
	for n := first; n <= last; n++ {
		k := portKey{proto, uint16(n)}
		if !e.ports.reserve(k, id) {
			continue
		}
		name, pid, inUse := e.cfg.Network.PortHolder(proto, uint16(n))
		if !inUse {
			return uint16(n), nil
		}
		e.ports.free(k)
		if first == last {
			return 0, conflict("Bind for 0.0.0.0:%d failed: port is already allocated: %s", n, holderText(name, pid))
		}
	}
	if first == last {
		return 0, conflict("Bind for 0.0.0.0:%d failed: port is already allocated", first)
	}
	return 0, conflict("all %s ports of %d-%d are allocated", proto, first, last)
}

func holderText(name string, pid int) string {
	if pid == 0 {
		return name + " publishes it"
	}
	return fmt.Sprintf("%s (pid %d) of this host listens on it", name, pid)
}

// hostsHead begins every container's hosts file.
const hostsHead = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::\tip6-localnet\nff00::\tip6-mcastprefix\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n"

// writeNetworkFiles writes hosts, hostname and resolv.conf, which are bound into the container.
func (e *Engine) writeNetworkFiles(r record) error {
	if o, err := e.sharesNetwork(r); o != nil || err != nil {
		return err // the other container's are bound
	}
	files, err := e.networkFiles(r)
	if err != nil {
		return err
	}
	for f, b := range files {
		if err := e.writeNetworkFile(r, f, b); err != nil {
			return err
		}
	}
	return nil
}

// writeNetworkFile writes in place, not by rename: a running container's bind must see it. 0644: the container's users read it.
func (e *Engine) writeNetworkFile(r record, name string, b []byte) error {
	return os.WriteFile(filepath.Join(e.containerDir(r.ID), name), b, 0o644)
}

// refreshNetworkFiles follows a change of networks in those files of a running container that it did not change itself.
func (e *Engine) refreshNetworkFiles(old, next record) error {
	before, err := e.networkFiles(old)
	if err != nil {
		return err
	}
	after, err := e.networkFiles(next)
	if err != nil {
		return err
	}
	for f, b := range after {
		now, err := os.ReadFile(filepath.Join(e.containerDir(old.ID), f))
		if err != nil {
			return err
		}
		if !bytes.Equal(now, before[f]) {
			continue
		}
		if err := e.writeNetworkFile(old, f, b); err != nil {
			return err
		}
	}
	return nil
}

func (e *Engine) networkFiles(r record) (map[string][]byte, error) {
	var hosts bytes.Buffer
	if r.HostConfig.NetworkMode == "host" {
		host, err := os.ReadFile("/etc/hosts")
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		hosts.Write(host)
	} else {
		hosts.WriteString(hostsHead)
	}
	for _, h := range r.HostConfig.ExtraHosts {
		name, addr, ok := strings.Cut(h, ":")
		if !ok {
			return nil, invalid("invalid extra host %q: want name:address", h)
		}
		addr = unbracket(addr)
		if addr == "host-gateway" {
			if l, err := e.nets.find(defaultBridge); err == nil {
				addr = l.Gateway.String()
			}
		}
		fmt.Fprintf(&hosts, "%s\t%s\n", addr, name)
	}
	name := r.Config.Hostname
	if r.Config.Domainname != "" {
		name += "." + r.Config.Domainname + "\t" + r.Config.Hostname
	}
	for _, a := range sandboxAddrs(r.Sandbox) {
		fmt.Fprintf(&hosts, "%s\t%s\n", a, name)
	}
	return map[string][]byte{"hosts": hosts.Bytes(), "hostname": []byte(r.Config.Hostname + "\n"), "resolv.conf": resolvConf(r)}, nil
}

func sandboxAddrs(s overlay.Sandbox) []netip.Addr {
	var out []netip.Addr
	for _, l := range s.Legs {
		out = append(out, l.Addr4.Addr())
		if l.Addr6.IsValid() {
			out = append(out, l.Addr6.Addr())
		}
	}
	for _, b := range s.Bridges {
		out = append(out, b.Addr4.Addr())
	}
	if len(out) == 0 && s.Gateway4.IsValid() {
		out = append(out, s.Gateway4)
	}
	return out
}
