// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"
)

const mostDraining = 20 * time.Second

// server answers for one pod.
type server struct {
	pod  string
	ends atomic.Bool  // it has been told to, and each connection is told with its next answer
	open atomic.Int64 // connections

	mu       sync.Mutex
	received map[string]int // datagrams by the sender's address
}

// serve opens every port, then waits for a signal. Ports are written as TCP:80 or UDP:53. Told to
// end it goes at once, or answers for drain longer, and then until no connection is left.
func serve(pod string, drain time.Duration, ports []string) error {
	s := &server{pod: pod, received: map[string]int{}}
	for _, text := range ports {
		if err := s.listen(text); err != nil {
			return err
		}
	}
	end := make(chan os.Signal, 1)
	signal.Notify(end, syscall.SIGTERM, syscall.SIGINT)
	<-end
	s.ends.Store(true)
	time.Sleep(drain)
	for last := time.Now().Add(mostDraining); drain > 0 && s.open.Load() > 0 && time.Now().Before(last); {
		time.Sleep(10 * time.Millisecond)
	}
	return nil
}

func (s *server) count(_ net.Conn, state http.ConnState) {
	switch state {
	case http.StateNew:
		s.open.Add(1)
	case http.StateClosed:
		s.open.Add(-1)
	}
}

func (s *server) listen(text string) error {
	protocol, port, _ := strings.Cut(text, ":")
	switch protocol {
	case "TCP":
		listener, err := net.Listen("tcp", ":"+port)
		if err != nil {
			return err
		}
		web := &http.Server{Handler: http.HandlerFunc(s.answer), ConnState: s.count}
		go web.Serve(listener)
		return nil
	case "UDP":
		socket, err := net.ListenPacket("udp", ":"+port)
		if err != nil {
			return err
		}
		go s.echo(socket.(*net.UDPConn))
		return nil
	}
	return fmt.Errorf("%q is not TCP:port or UDP:port", text)
}

func (s *server) answer(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	if s.ends.Load() {
		w.Header().Set("Connection", "close")
	}
	if r.URL.Path == "/received" {
		s.mu.Lock()
		defer s.mu.Unlock()
		json.NewEncoder(w).Encode(s.received)
		return
	}
	client, _, _ := net.SplitHostPort(r.RemoteAddr)
	json.NewEncoder(w).Encode(map[string]string{"pod": s.pod, "client": client})
}

// echo answers from the address that was asked, whatever the route to the client prefers: a node has
// several.
func (s *server) echo(socket *net.UDPConn) {
	if raw, err := socket.SyscallConn(); err == nil {
		raw.Control(func(fd uintptr) {
			syscall.SetsockoptInt(int(fd), syscall.IPPROTO_IPV6, syscall.IPV6_RECVPKTINFO, 1)
		})
	}
	buffer, control := make([]byte, 65536), make([]byte, 256)
	for {
		n, size, _, from, err := socket.ReadMsgUDPAddrPort(buffer, control)
		if err != nil {
			continue // an ICMP error for an earlier answer
		}
		host := from.Addr().Unmap().String()
		s.mu.Lock()
		s.received[host]++
		s.mu.Unlock()
		answer := append([]byte(s.pod+" "), buffer[:n]...)
		socket.WriteMsgUDPAddrPort(answer, asked(control[:size]), from)
	}
}

// asked is control data to send from the address that other control data says was asked.
func asked(control []byte) []byte {
	messages, err := syscall.ParseSocketControlMessage(control)
	if err != nil {
		return nil
	}
	for _, message := range messages {
		if message.Header.Level == syscall.IPPROTO_IPV6 && message.Header.Type == syscall.IPV6_PKTINFO {
			made := make([]byte, syscall.CmsgSpace(syscall.SizeofInet6Pktinfo))
			header := (*syscall.Cmsghdr)(unsafe.Pointer(&made[0]))
			header.Level, header.Type = syscall.IPPROTO_IPV6, syscall.IPV6_PKTINFO
			header.SetLen(syscall.CmsgLen(syscall.SizeofInet6Pktinfo))
			// Without the interface: where the answer goes out is the route's to say.
			copy(made[syscall.CmsgLen(0):], message.Data[:net.IPv6len])
			return made
		}
	}
	return nil
}
