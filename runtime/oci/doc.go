// Package oci carries out the operations of the OCI runtime specification on containers that belong to nobody in particular: a short
// process creates one, another starts it, a third removes it, and their state is in files below one root directory.
//
// It guarantees that a config it cannot serve wholly is refused, naming the field, before anything is made; that a failed create
// leaves nothing; and that paths inside a root are walked by handle only. It has no supervisor: whoever is the parent, or the
// subreaper, learns exit codes. It must not be used by the engine, whose containers belong to runtime/supervisor. Used by
// cmd/skein-oci.
package oci
