// Command skein-oci is the container runtime behind the OCI command line: create, start, state, kill, delete and what belongs to them.
//
// It is small on purpose, since other engines run it once per operation. It must not link what only a cluster needs. What it does is in
// runtime/oci; this package is its flags, streams and exit codes.
package main

import (
	"os"
	"runtime/debug"
)

func main() {
	// A command that lives for milliseconds needs no collector; one that stays for hours, in front of a container, gets one at this size.
	debug.SetGCPercent(-1)
	debug.SetMemoryLimit(32 << 20)
	os.Exit(run(os.Args[1:]))
}
