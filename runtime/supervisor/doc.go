// Package supervisor is the process that is the parent of a node's containers, and the daemon's client of it.
//
// The supervisor outlives the daemon: containers, their logs and exits do not depend on the daemon being there. It serves only its own
// user on a socket of mode 0600, holds no network connection, and is not dumpable. An exit is appended to a journal and synced before
// anybody is told; clients follow the journal by number and miss nothing over restarts of either side. A supervisor that starts finds
// the records of an earlier one and adopts what still runs: it waits on process handles, opens the output pipes again, and reads exit
// codes from the kernel where it keeps them (6.15), otherwise they are unknown. Lost with a supervisor: terminals' masters, open
// standard inputs, the output of additional processes, stored descriptors.
//
// Main is run by cmd/skein in a process of its own; Dial and Ensure by the daemon.
package supervisor
