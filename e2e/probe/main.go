// SPDX-License-Identifier: Apache-2.0

// Command probe is what runs in the pods of the e2e tests: one static program that answers and asks.
//
//	probe serve TCP:80 UDP:53 …   answers, until it is told to end; names itself by $POD. With
//	                              $DRAIN it takes so long, and then until its clients have gone
//	probe ask                     reads questions, one JSON object a line; writes answers the same way
//	probe flood ADDRESS PORT      sends UDP from its first moment on, and never waits
//
// TCP ports speak HTTP/1.1: the body is {"pod": …, "client": …}, whatever is asked, but for
// /received: how many datagrams each address has sent. UDP ports send back what came, after the
// pod's name and a space. The same as Tidegate's own responders in network namespaces.
package main

import (
	"fmt"
	"os"
	"time"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "probe:", err)
		os.Exit(1)
	}
}

func run(arguments []string) error {
	switch {
	case len(arguments) > 0 && arguments[0] == "serve":
		drain, _ := time.ParseDuration(os.Getenv("DRAIN")) // nothing: at once
		return serve(os.Getenv("POD"), drain, arguments[1:])
	case len(arguments) == 1 && arguments[0] == "ask":
		return ask(os.Stdin, os.Stdout)
	case len(arguments) == 3 && arguments[0] == "flood":
		return flood(arguments[1], arguments[2])
	}
	return fmt.Errorf("usage: probe serve [PROTOCOL:PORT…] | ask | flood ADDRESS PORT")
}
