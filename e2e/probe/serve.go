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
		go s.echo(socket)
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

func (s *server) echo(socket net.PacketConn) {
	buffer := make([]byte, 65536)
	for {
		n, from, err := socket.ReadFrom(buffer)
		if err != nil {
			continue // an ICMP error for an earlier answer
		}
		host, _, _ := net.SplitHostPort(from.String())
		s.mu.Lock()
		s.received[host]++
		s.mu.Unlock()
		socket.WriteTo(append([]byte(s.pod+" "), buffer[:n]...), from)
	}
}
