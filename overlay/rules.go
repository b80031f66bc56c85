package overlay

import "skein/overlay/link"

// Policy rules lead answers of marked connections to the table of the node that they came through. Rules are tried one after the other, so a
// list of all nodes would cost each such packet 10 ns a node: they form a tree over the bits of the mark, of at most 64, 16 and 16 branches.
// Unmarked packets, which are all others, meet the first rule and the one that leads around the tree.
//
//	90            marked: go on at treePref
//	treePref      not marked: go on at treeEnd
//	treeTop       bits 8 and more: go on at treeGroups + those bits
//	treeGroups…   bits 4 and more: go on at treeNodes + those bits
//	treeNodes…    all bits: look up the node's table
//	treeEnd       nothing
const (
	rulePref   = 90
	treePref   = 0x5ce1 // far behind what people number by hand, before the main table
	treeTop    = treePref + 1
	treeGroups = treeTop + 1
	treeNodes  = treeGroups + (maxNode+2)>>8
	treeEnd    = treeNodes + (maxNode+2)>>4
)

// addPeerRule adds what leads to one node's table.
func addPeerRule(rules map[link.RuleKey]link.Rule, node uint32) {
	rules[link.RuleKey{Pref: treeTop, Mark: markBase | node&^0xff, Mask: 0xffffff00}] = link.Rule{Goto: treeGroups + node>>8}
	rules[link.RuleKey{Pref: treeGroups + node>>8, Mark: markBase | node&^0xf, Mask: 0xfffffff0}] = link.Rule{Goto: treeNodes + node>>4}
	rules[link.RuleKey{Pref: treeNodes + node>>4, Mark: markBase | node, Mask: 0xffffffff}] = link.Rule{Table: tableBase + node}
}

// commonRules are those that need no node.
func commonRules() map[link.RuleKey]link.Rule {
	return map[link.RuleKey]link.Rule{
		{Pref: rulePref, Mark: markBase, Mask: markMask}:            {Goto: treePref},
		{Pref: treePref, Mark: markBase, Mask: markMask, Not: true}: {Goto: treeEnd},
		{Pref: treeEnd}: {},
	}
}
