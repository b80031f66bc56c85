package sandbox

import "github.com/opencontainers/runtime-spec/specs-go"

const nativeArch = specs.ArchAARCH64

// runnable says whether processes of this calling convention exist on this machine.
func runnable(a specs.Arch) bool { return a == specs.ArchAARCH64 || a == specs.ArchARM }
