// Package api holds what managers and nodes say to each other: the gRPC services, the records of the Raft log, task states and IDs.
// It depends on nothing of ours and decides nothing. Everybody may import it.
package api

//go:generate protoc --proto_path=. --go_out=. --go_opt=paths=source_relative --go-grpc_out=. --go-grpc_opt=paths=source_relative log.proto dispatcher.proto control.proto
