// SPDX-License-Identifier: Apache-2.0

package main

import (
	"net"
	"time"
)

// flood sends datagrams without a pause and ignores every error: what a pod could do that must not.
// Each second is a flow of its own, so that one which began before somebody looked is not the last.
func flood(address, port string) error {
	to, err := net.ResolveUDPAddr("udp", net.JoinHostPort(address, port))
	if err != nil {
		return err
	}
	for {
		socket, err := net.ListenPacket("udp", ":0")
		if err != nil {
			return err
		}
		for began := time.Now(); time.Since(began) < time.Second; {
			socket.WriteTo([]byte("flood"), to)
		}
		socket.Close()
	}
}
