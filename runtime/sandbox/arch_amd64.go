package sandbox

import "github.com/opencontainers/runtime-spec/specs-go"

const nativeArch = specs.ArchX86_64

// runnable says whether processes of this calling convention exist on this machine.
func runnable(a specs.Arch) bool { return a == specs.ArchX86_64 || a == specs.ArchX86 }
