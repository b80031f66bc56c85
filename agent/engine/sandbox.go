package engine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/network"

	"skein/overlay"
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
	wished := map[string]*network.EndpointSettings{}
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
	names := sortedKeys(wished)
	if wished[mode] == nil {
		names, wished[mode] = append(names, mode), &network.EndpointSettings{}
	}
	out := map[string]*network.EndpointSettings{}
	for i, name := range names {
		s := wished[name]
		if cluster, settings, err := e.clusterEndpoint(name, s); err != nil {
			return nil, err
		} else if cluster != "" {
			out[cluster] = settings
			continue
		}
		l, err := e.nets.find(name)
		if err != nil {
			return nil, invalid("%v", err) // not "not found": clients take that for the image's and pull it
		}
		if out[l.Name] != nil && i == len(names)-1 {
			continue // the mode's network was named by its id
		}
		if l.ConfigOnly {
			return nil, errf(errDenied, "%s is a configuration only network", l.Name)
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
	if err := e.checkLinked(r); err != nil {
		return "", err
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
	path, err := e.cfg.Network.AddSandbox(ctx, sb)
	if err == nil {
		e.tellLinking(r.ID)
		e.emitEndpoints(r, events.ActionConnect)
	}
	return path, err
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

func (e *Engine) releaseBridges(r record) {
	e.ports.release(r.ID)
	for _, s := range r.Networks {
		e.nets.give(s.NetworkID, r.ID)
	}
	if l, err := e.nets.find(gatewayBridge); err == nil {
		e.nets.give(l.ID, r.ID)
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
	if !r.State.Clean && len(r.Sandbox.Bridges) > 0 {
		e.emitEndpoints(r, events.ActionDisconnect)
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
		w := wished(s.NetworkID, s)
		for _, l := range r.Sandbox.Bridges {
			if m, err := net.ParseMAC(l.MAC); l.BridgeID == s.NetworkID && err == nil {
				w.MacAddress = network.HardwareAddr(m)
			} else if l.BridgeID == s.NetworkID { // it was none of the user's
				w.MacAddress = nil
			}
		}
		nets[name] = w
	}
	r.Networks, r.Sandbox = nets, overlay.Sandbox{}
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
				p, _ := l.first(false)
				addr = p.Gateway.String()
			}
		}
		fmt.Fprintf(&hosts, "%s\t%s\n", addr, name)
	}
	hosts.WriteString(e.linkLines(r))
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
		for _, p := range []netip.Prefix{b.Addr4, b.Addr6} {
			if p.IsValid() {
				out = append(out, p.Addr())
			}
		}
	}
	if len(out) == 0 && s.Gateway4.IsValid() {
		out = append(out, s.Gateway4)
	}
	return out
}
