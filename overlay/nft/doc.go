// Package nft keeps nftables tables of ours as they should be.
//
// A Table is the whole desired content: static rules, and sets and maps whose elements change. Syncer.Sync brings the kernel there in
// one atomic transaction: element by element while the rules are right, by replacing the whole table when they are not, so that a packet
// never meets half of a change. Only tables named in a Table are touched. Expressions are encoded by google/nftables; the messages and
// the one expression which that library lacks (ct original zone set) are encoded here. Used by package overlay.
package nft
