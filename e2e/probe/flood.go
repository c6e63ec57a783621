// SPDX-License-Identifier: Apache-2.0

package main

import "net"

// flood sends datagrams without a pause and ignores every error: what a pod could do that must not.
func flood(address, port string) error {
	socket, err := net.ListenPacket("udp", ":0")
	if err != nil {
		return err
	}
	to, err := net.ResolveUDPAddr("udp", net.JoinHostPort(address, port))
	if err != nil {
		return err
	}
	for {
		socket.WriteTo([]byte("flood"), to)
	}
}
