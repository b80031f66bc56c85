// Command noop is what benchmarks run in containers: with "true" it ends at once, otherwise it sleeps until SIGTERM. It starts in well
// under a millisecond, so what is measured is the product.
package main

import (
	"os"
	"os/signal"
	"syscall"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == "true" {
		return
	}
	ch := make(chan os.Signal, 1)
	signal.Notify(ch, syscall.SIGTERM)
	<-ch
}
