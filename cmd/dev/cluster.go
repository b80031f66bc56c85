// Package dev runs a cluster on one machine: each node is a network namespace, a mount namespace with its own /run, a cgroup subtree
// and a real daemon, joined by a bridge that lives in a namespace of its own. Everything is named after the cluster, so that Down finds
// and removes it whatever crashed. It is how Skein is tried, and what the integration tests use.
package dev

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"sort"
	"strconv"
	"strings"
	"syscall"
)

const (
	defaultRoot  = "/var/lib/skein-dev" // SKEIN_DEV_DIR overrides it
	netnsDir     = "/run/netns"         // where `ip netns` looks
	cgroupRoot   = "/skein-dev"
	maxNodes     = 200 // addresses .1 to .200 of the cluster's /24; .254 is the machine's own
	hostSuffix   = 254
	subnetSecond = 18 // 198.18.0.0/15 is reserved for tests between devices (RFC 2544): clusters take /24s of 198.18.0.0/16
)

var validCluster = regexp.MustCompile(`^[a-z][a-z0-9]{0,5}$`) // short: device names have 15 bytes

// Cluster is a cluster of one machine, as its file says.
type Cluster struct {
	Name   string
	Subnet netip.Prefix
	Binary string // the skein executable the nodes run
	Nodes  []*Node
	Flags  []string // further flags of every daemon

	IPv6 bool `json:",omitempty"` // the nodes have no IPv4 address

	DiskMiB int `json:",omitempty"` // size of each node's own disk; 0: state lies on the machine's
}

// Node is one node of a Cluster.
type Node struct {
	Name      string `json:"name"`
	Role      string `json:"role"` // as created; promotion does not change it
	Address   string `json:"address"`
	Namespace string `json:"namespace"` // for `ip netns exec`
	StateDir  string `json:"state_dir"`
	Socket    string `json:"socket"`
	PID       int    `json:"pid"` // of the daemon, 0 when it does not run
}

// Root is the directory of all clusters.
func Root() string {
	if d := os.Getenv("SKEIN_DEV_DIR"); d != "" {
		return d
	}
	return defaultRoot
}

func clusterDir(name string) string { return filepath.Join(Root(), name) }

func (c *Cluster) dir() string            { return clusterDir(c.Name) }
func (c *Cluster) nodeDir(n *Node) string { return filepath.Join(c.dir(), n.Name) }
func (c *Cluster) runDir(n *Node) string  { return filepath.Join(c.nodeDir(n), "run") }
func (c *Cluster) cgroup(n *Node) string  { return filepath.Join(cgroupRoot, c.Name, n.Name) }
func (c *Cluster) fabric() string         { return "skein-" + c.Name + "-fabric" }
func (c *Cluster) hostDevice() string     { return "skd-" + c.Name }
func (c *Cluster) port(n *Node) string    { return n.Name }
func (c *Cluster) hostAddr() netip.Addr   { return lastByte(c.Subnet, hostSuffix) }
func (c *Cluster) supervisor(n *Node) string {
	return filepath.Join(c.runDir(n), "skein", "supervisor.sock")
}

// Fabric is the network namespace of the bridge that joins the nodes; a node's port there has its name.
func (c *Cluster) Fabric() string { return c.fabric() }

// Group is the cgroup of everything of a node.
func (c *Cluster) Group(n *Node) string { return c.cgroup(n) }

// subnet6 is a /64 of the documentation prefix that goes with the IPv4 subnet; addresses end as the IPv4 ones.
func (c *Cluster) subnet6() netip.Prefix {
	s := c.Subnet.Addr().As4()
	b := [16]byte{0x20, 0x01, 0x0d, 0xb8, 0x5c, 0xe1, s[1], s[2]}
	return netip.PrefixFrom(netip.AddrFrom16(b), 64)
}

func (c *Cluster) addr6(a netip.Addr) netip.Addr {
	b := c.subnet6().Addr().As16()
	b[15] = a.As4()[3]
	return netip.AddrFrom16(b)
}

// HostAddr6 is HostAddr in IPv6.
func (c *Cluster) HostAddr6() netip.Addr { return c.addr6(c.hostAddr()) }

// Addr6 is a node's address in IPv6.
func (c *Cluster) Addr6(n *Node) netip.Addr {
	a, _ := netip.ParseAddr(n.Address) // made by newNode
	if a.Is6() {
		return a
	}
	return c.addr6(a)
}

// HostAddr is the machine's own address on the cluster's fabric: nodes reach servers that listen there, and the machine reaches the
// nodes' published ports from it.
func (c *Cluster) HostAddr() netip.Addr {
	if c.IPv6 {
		return c.HostAddr6()
	}
	return c.hostAddr()
}

func lastByte(p netip.Prefix, b byte) netip.Addr {
	a := p.Addr().As4()
	a[3] = b
	return netip.AddrFrom4(a)
}

// Load reads a cluster's file.
func Load(name string) (*Cluster, error) {
	b, err := os.ReadFile(filepath.Join(clusterDir(name), "cluster.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("there is no development cluster %q: start one with `skein dev up --name %s`, or see `skein dev ls`", name, name)
	}
	if err != nil {
		return nil, fmt.Errorf("development cluster %s: %w", name, err)
	}
	c := &Cluster{}
	if err := json.Unmarshal(b, c); err != nil {
		return nil, fmt.Errorf("development cluster %s: its file is damaged (%w): remove it with `skein dev down --name %s`", name, err, name)
	}
	for _, n := range c.Nodes {
		n.PID = c.daemonPID(n)
	}
	return c, nil
}

// List returns the names of all clusters of this machine, also half removed ones.
func List() ([]string, error) {
	names := map[string]bool{}
	dirs, err := os.ReadDir(Root())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, d := range dirs {
		if validCluster.MatchString(d.Name()) {
			names[d.Name()] = true
		}
	}
	spaces, err := os.ReadDir(netnsDir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, s := range spaces {
		f := strings.Split(s.Name(), "-")
		if len(f) == 3 && f[0] == "skein" && validCluster.MatchString(f[1]) {
			names[f[1]] = true
		}
	}
	out := make([]string, 0, len(names))
	for n := range names {
		out = append(out, n)
	}
	sort.Strings(out)
	return out, nil
}

func (c *Cluster) save() error {
	b, err := json.MarshalIndent(c, "", "  ")
	if err != nil {
		return err
	}
	tmp := filepath.Join(c.dir(), ".cluster.json")
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, filepath.Join(c.dir(), "cluster.json"))
}

// Node finds a node by name.
func (c *Cluster) Node(name string) (*Node, error) {
	var names []string
	for _, n := range c.Nodes {
		if n.Name == name {
			return n, nil
		}
		names = append(names, n.Name)
	}
	return nil, fmt.Errorf("cluster %s has no node %q: it has %s", c.Name, name, strings.Join(names, ", "))
}

// newNode adds a node with the lowest free number to the cluster's list.
func (c *Cluster) newNode(role string) (*Node, error) {
	used := map[string]bool{}
	for _, n := range c.Nodes {
		used[n.Name] = true
	}
	for i := 1; i <= maxNodes; i++ {
		name := "n" + strconv.Itoa(i)
		if used[name] {
			continue
		}
		n := &Node{Name: name, Role: role, Address: lastByte(c.Subnet, byte(i)).String(), Namespace: "skein-" + c.Name + "-" + name}
		if c.IPv6 {
			n.Address = c.addr6(lastByte(c.Subnet, byte(i))).String()
		}
		n.StateDir = filepath.Join(c.nodeDir(n), "state")
		n.Socket = filepath.Join(c.runDir(n), "skein", "skein.sock")
		c.Nodes = append(c.Nodes, n)
		return n, nil
	}
	return nil, fmt.Errorf("cluster %s is full: a development cluster has at most %d nodes", c.Name, maxNodes)
}

// daemonPID is the node's daemon, 0 when it does not run. The pid of the file counts only while it is in the node's cgroup.
func (c *Cluster) daemonPID(n *Node) int {
	b, err := os.ReadFile(filepath.Join(c.nodeDir(n), "daemon.pid"))
	if err != nil {
		return 0
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil || syscall.Kill(pid, 0) != nil {
		return 0
	}
	if !inCgroup(pid, c.cgroup(n)) || zombie(pid) {
		return 0
	}
	return pid
}

// inCgroup reports whether the process is in the group or below it, in any hierarchy.
func inCgroup(pid int, group string) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return false
	}
	for _, line := range strings.Split(string(b), "\n") {
		f := strings.SplitN(line, ":", 3)
		if len(f) == 3 && (f[2] == group || strings.HasPrefix(f[2], group+"/")) {
			return true
		}
	}
	return false
}

func zombie(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return true
	}
	i := strings.LastIndexByte(string(b), ')')
	return i < 0 || i+2 >= len(b) || b[i+2] == 'Z' || b[i+2] == 'X'
}
