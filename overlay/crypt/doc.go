// Package crypt carries a node's encrypted networks to other nodes inside WireGuard.
//
// A Tunnel owns this node's WireGuard keys, one UDP socket per key, and for each encrypted network a TUN device in that network's router
// namespace. What a container sends over such a device is read here, put into the VXLAN packet that other nodes expect, and encrypted; there
// is no other way out of the namespace, so nothing leaves plainly, whatever dies. What comes out of WireGuard goes to the device of
// its VNI, and to nothing else.
//
// Private keys are made on the node and rest, like the devices and sockets, in the supervisor's store of descriptors: they survive the daemon
// and are on no disk. Sessions are agreed anew when the daemon starts. Used by overlay.
package crypt
