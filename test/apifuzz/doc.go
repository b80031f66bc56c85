// Package apifuzz drives what clients can send through everything that reads it: an HTTP request, the Docker API's router, the control
// service, the store's Apply, and back. Its fuzz tests hold that
//
//   - nothing panics, and what comes in bounds what is kept of it;
//   - a request that is refused changed nothing;
//   - what the store keeps and shows again is what was sent: shown, sent again and shown again, it is the same byte for byte.
//
// "go test" runs the seeds and the kept corpus. A search, for each of FuzzServiceSpec, FuzzObjects, FuzzQuery, FuzzControl:
//
//	CGO_ENABLED=0 go test -run xxx -fuzz '^FuzzServiceSpec$' -fuzztime 5m -fuzzminimizetime 1s ./test/apifuzz
package apifuzz
