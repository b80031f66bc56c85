// Command matrix shows that published ports keep the client's address: every entry node × placement of the task × {tcp4, tcp6, udp4, udp6}, by
// an outside client, processes of nodes, containers, and several entry nodes at once with one and the same client port. It starts a
// development cluster of its own and removes it again. See README.md.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	o := options{}
	flag.StringVar(&o.name, "name", "mtrx", "name of the development cluster")
	flag.StringVar(&o.binary, "binary", "", "the skein executable; empty: it is built")
	flag.IntVar(&o.nodes, "nodes", 3, "number of nodes, the first of which is the manager")
	flag.BoolVar(&o.ipv6, "ipv6", false, "the nodes have IPv6 addresses alone, and tunnels over them")
	flag.IntVar(&o.requests, "requests", 10_000, "requests of the outside client per protocol")
	flag.IntVar(&o.clients, "clients", 8, "requests at a time")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	broken, err := run(ctx, o, func(format string, a ...any) { fmt.Printf(format+"\n", a...) })
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	if broken > 0 {
		os.Exit(1)
	}
}
