// Package link talks rtnetlink: network namespaces, veth, VXLAN, bridges, addresses, routes, neighbours, forwarding entries, policy rules.
//
// It guarantees that many changes travel in one system call (Conn.Do), that every entry is written with "replace" so that repeating it
// is harmless, and that every route and rule it makes carries Protocol, so that ours can be told from others'. It must not decide what
// should exist, and it never executes a program. Used by package overlay and, for its raw socket, by overlay/nft.
package link
