// Package supervisor is the process that is the parent of a node's containers, and the daemon's client of it.
//
// The supervisor outlives the daemon: containers, their logs and exits do not depend on the daemon being there. It serves only its own
// user on a socket of mode 0600, holds no network connection, and is not dumpable. An exit is appended to a journal and synced before
// anybody is told; clients follow the journal by number and miss nothing over restarts of either side. A supervisor that starts finds
// the records of an earlier one and adopts what still runs: it waits on process handles, and reads exit codes from the kernel where it
// keeps them (6.15), otherwise they are unknown. The client that Ensure returns keeps duplicates of handles, pipes and terminals and gives them to
// the new supervisor; output pipes that nobody kept are found in the processes. Lost with a supervisor: stored descriptors, containers that
// wait for their start, attached clients, and, when no client keeps them, terminals and open standard inputs. A supervisor of another build is
// replaced in place, and nothing is lost.
//
// Main is run by cmd/skein in a process of its own; Dial and Ensure by the daemon.
package supervisor
