package daemon

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
)

// settings is what rests on disk of how this node takes part.
type settings struct {
	Listen   string   // host:port
	RPCAddr  string   // host:port as others reach it
	Underlay string   // address of VXLAN packets
	Seeds    []string // managers to begin with
}

// settingsFor chooses this node's addresses: the request's words, then the daemon's flags.
func (m *membership) settingsFor(listen, advertise, dataPath string) (settings, error) {
	l, err := listenAddress(listen, m.cfg.ListenAddr)
	if err != nil {
		return settings{}, err
	}
	if advertise == "" {
		advertise = m.cfg.AdvertiseAddr
	}
	a, port, err := chooseAddress(advertise, "--advertise-addr")
	if err != nil {
		return settings{}, err
	}
	if dataPath == "" {
		dataPath = m.cfg.DataPathAddr
	}
	d := a
	if dataPath != "" {
		if d, _, err = chooseAddress(dataPath, "--data-path-addr"); err != nil {
			return settings{}, err
		}
	}
	if a.Is6() {
		l = dualStack(l)
	}
	if port == "" {
		_, port, _ = net.SplitHostPort(l) // checked by listenAddress
	}
	return settings{Listen: l, RPCAddr: net.JoinHostPort(a.String(), port), Underlay: d.String()}, nil
}

// loadSettings reads them back. They were written before the identity, so a node with an identity has them.
func (m *membership) loadSettings() (settings, error) {
	const fix = "restore the file, or leave with \"docker swarm leave --force\" and join again"
	var s settings
	b, err := os.ReadFile(m.settingsFile())
	if errors.Is(err, fs.ErrNotExist) {
		return s, fmt.Errorf("this node has a certificate but %s is missing: %s", m.settingsFile(), fix)
	}
	if err == nil {
		err = json.Unmarshal(b, &s)
	}
	if err == nil {
		err = s.check()
	}
	if err != nil {
		return s, fmt.Errorf("cluster settings %s are damaged: %w: %s", m.settingsFile(), err, fix)
	}
	return s, nil
}

func (s settings) check() error {
	if _, err := netip.ParseAddrPort(s.Listen); err != nil {
		return fmt.Errorf("Listen: %w", err)
	}
	if _, err := netip.ParseAddrPort(s.RPCAddr); err != nil {
		return fmt.Errorf("RPCAddr: %w", err)
	}
	if _, err := netip.ParseAddr(s.Underlay); err != nil {
		return fmt.Errorf("Underlay: %w", err)
	}
	return nil
}

// saveSettings replaces the file durably.
func (m *membership) saveSettings(s settings) (err error) {
	b, err := json.Marshal(s)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(m.clusterDir(), 0o700); err != nil {
		return fmt.Errorf("cluster settings: %w", err)
	}
	tmp := m.settingsFile() + ".new"
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("cluster settings: %w", err)
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(tmp, m.settingsFile())
	}
	if err == nil {
		err = syncDir(filepath.Dir(tmp))
	}
	if err != nil {
		return fmt.Errorf("cluster settings: %w", err)
	}
	return nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
