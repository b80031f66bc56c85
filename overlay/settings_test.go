package overlay

import (
	"context"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"skein/overlay/link"
)

// settingsOf reads all kernel settings of a namespace that are not of devices of ours.
func settingsOf(t *testing.T, ns *link.NS) map[string]string {
	t.Helper()
	out := map[string]string{}
	err := ns.Do(func() error {
		for _, pattern := range []string{"ipv4/*", "ipv6/*", "ipv[46]/conf/all/*", "ipv[46]/conf/default/*", "ipv[46]/conf/lo/*", "ipv[46]/conf/eth0/*", "netfilter/*"} {
			files, err := filepath.Glob("/proc/sys/net/" + pattern)
			if err != nil {
				return err
			}
			for _, f := range files {
				if b, err := os.ReadFile(f); err == nil && !strings.HasSuffix(f, "_count") {
					out[strings.TrimPrefix(f, "/proc/sys/net/")] = string(b)
				}
			}
		}
		return nil
	})
	if err != nil || len(out) < 100 {
		t.Fatal(len(out), err)
	}
	return out
}

// A node's kernel settings are after leaving what they were before joining, also when the daemon was another meanwhile, and those that
// bridges need stay with the bridges.
func TestSettingsAreGivenBack(t *testing.T) {
	l := newLab(t, 1)
	h, ctx := l.hosts[0], context.Background()
	l.must(h.ns.Sysctl(map[string]string{"ipv4/conf/all/rp_filter": "1", "ipv4/conf/default/rp_filter": "0", "ipv4/conf/eth0/rp_filter": "0", "ipv4/ip_forward": "0"}))
	before := settingsOf(t, h.ns)
	same := func(when string, but ...string) {
		t.Helper()
		after := settingsOf(t, h.ns)
		for k, v := range maps.All(before) {
			if after[k] != v && !strings.Contains(strings.Join(but, " "), k) {
				t.Errorf("%s: %s is %q, was %q", when, k, after[k], v)
			}
		}
	}
	l.setAll([]Network{webNetwork(Ready)}, webMesh(1))
	l.must(h.Driver.Close())
	h.Driver = l.driver(1, nil)
	l.setAll([]Network{webNetwork(Ready)}, webMesh(1))
	if maps.Equal(before, settingsOf(t, h.ns)) {
		t.Fatal("joining changed nothing, so this test shows nothing")
	}
	l.must(h.Leave(ctx))
	same("after leaving")
	br := Bridge{ID: "b", Name: "skt0", Subnet4: netip.MustParsePrefix("172.30.0.0/24"), Gateway4: addr("172.30.0.1")}
	l.must(h.SetBridges(ctx, []Bridge{br}))
	l.setAll([]Network{webNetwork(Ready)}, webMesh(1))
	l.must(h.Leave(ctx))
	if v, err := h.ns.ReadSysctl("ipv4/ip_forward"); err != nil || v != "1" {
		t.Errorf("with a bridge, ip_forward is %q after leaving: %v", v, err)
	}
	l.must(h.Teardown(ctx))
	same("after everything is gone")
	if _, err := os.Stat(h.sysctlFile()); !os.IsNotExist(err) {
		t.Errorf("a file is left: %v", err)
	}
}
