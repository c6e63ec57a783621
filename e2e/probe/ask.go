// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"sort"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	timedOut       = "timed out"
	datagram       = "tidegate-probe"
	datagramSends  = 3
	maxAtOnce      = 256
	maxAnswerBytes = 65536
	dialWait       = 5 * time.Second
)

// question is one line of input. Op is "probe", "resolve", "stream", "pulse", "peek" or "stop".
type question struct {
	ID       int     `json:"id"`
	Op       string  `json:"op"`
	Address  string  `json:"address"` // an IP address; for "resolve" a name
	Port     int     `json:"port"`
	Protocol string  `json:"protocol"` // TCP or UDP
	Seconds  float64 `json:"seconds"`  // how long to wait; of "stream" and "pulse": between two
	Path     string  `json:"path"`     // of HTTP, with its slash
	Stream   int     `json:"stream"`   // of "peek" and "stop": the id of the question that began it
	Reopen   bool    `json:"reopen"`   // of "stream": another connection when the server says so
}

// result is one line of output.
type result struct {
	ID     int    `json:"id"`
	Pod    string `json:"pod"`    // who answered; "" = nobody
	Client string `json:"client"` // whom the answering pod saw, with HTTP
	Detail string `json:"detail"` // what happened instead; "" for a proper answer
	Body   string `json:"body,omitempty"`

	Addresses []string `json:"addresses,omitempty"` // of "resolve"
	Answered  int      `json:"answered"`            // of "peek" and "stop": requests that were
	Gap       float64  `json:"gap"`                 // of "peek" and "stop": the longest time without an answer, seconds

	Heard map[string][2]int64 `json:"heard,omitempty"` // of a pulse; see there

	last bool // the server takes no more on this connection
}

// asker holds what outlives one question.
type asker struct {
	mu      sync.Mutex
	out     *json.Encoder
	streams map[int]*stream
	pulses  map[int]*pulse
}

// ask answers questions, many at once and in no order, until there are no more.
func ask(in io.Reader, out io.Writer) error {
	a := &asker{out: json.NewEncoder(out), streams: map[int]*stream{}, pulses: map[int]*pulse{}}
	free := make(chan struct{}, maxAtOnce)
	var under sync.WaitGroup
	lines := bufio.NewScanner(in)
	for lines.Scan() {
		var q question
		if err := json.Unmarshal(lines.Bytes(), &q); err != nil {
			return fmt.Errorf("%q: %w", lines.Text(), err)
		}
		free <- struct{}{}
		under.Add(1)
		go func() {
			defer under.Done()
			r := a.one(q)
			r.ID = q.ID
			a.mu.Lock()
			a.out.Encode(r)
			a.mu.Unlock()
			<-free
		}()
	}
	under.Wait()
	return lines.Err()
}

func (a *asker) one(q question) result {
	switch {
	case q.Op == "resolve":
		return resolve(q)
	case q.Op == "stream":
		return a.begin(q)
	case q.Op == "pulse":
		return a.beat(q)
	case q.Op == "peek", q.Op == "stop":
		return a.look(q)
	case q.Protocol == "UDP":
		return echo(q)
	}
	return get(q)
}

// ---- one question -----------------------------------------------------------------------

func seconds(value float64) time.Duration { return time.Duration(value * float64(time.Second)) }

func (q question) target() string { return net.JoinHostPort(q.Address, fmt.Sprint(q.Port)) }

// said is an error as people and tests read it: the system's own words, no addresses.
func said(err error) string {
	var number syscall.Errno
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, context.DeadlineExceeded):
		return timedOut
	case errors.As(err, &number):
		return number.Error()
	}
	return err.Error()
}

func resolve(q question) result {
	within, cancel := context.WithTimeout(context.Background(), seconds(q.Seconds))
	defer cancel()
	found, err := (&net.Resolver{PreferGo: true}).LookupHost(within, q.Address)
	if err != nil {
		return result{Detail: said(err)}
	}
	sort.Strings(found)
	return result{Addresses: found}
}

func get(q question) result {
	connection, err := net.DialTimeout("tcp", q.target(), seconds(q.Seconds))
	if err != nil {
		return result{Detail: said(err)}
	}
	defer connection.Close()
	connection.SetDeadline(time.Now().Add(seconds(q.Seconds)))
	return request(connection, bufio.NewReader(connection), q)
}

// request sends one HTTP request on a connection and reads the whole answer.
func request(connection net.Conn, reader *bufio.Reader, q question) result {
	path := q.Path
	if path == "" {
		path = "/"
	}
	if _, err := fmt.Fprintf(connection, "GET %s HTTP/1.1\r\nHost: tidegate\r\n\r\n", path); err != nil {
		return result{Detail: said(err)}
	}
	answer, err := http.ReadResponse(reader, nil)
	if err != nil {
		return result{Detail: said(err)}
	}
	body, err := io.ReadAll(io.LimitReader(answer.Body, maxAnswerBytes))
	answer.Body.Close()
	if err != nil {
		return result{Detail: said(err)}
	}
	var fields struct{ Pod, Client string }
	if err := json.Unmarshal(body, &fields); err != nil || fields.Pod == "" {
		return result{Body: string(body), Detail: fmt.Sprintf("status %d, no pod's name", answer.StatusCode)}
	}
	return result{Pod: fields.Pod, Client: fields.Client, last: answer.Close}
}

// echo sends again where no answer comes.
func echo(q question) result {
	r := result{Detail: timedOut}
	for n := 0; n < datagramSends && r.Detail == timedOut; n++ {
		r = echoOnce(q, seconds(q.Seconds/datagramSends))
	}
	return r
}

// echoOnce sends one datagram from a socket of its own.
func echoOnce(q question, wait time.Duration) result {
	socket, err := net.Dial("udp", q.target())
	if err != nil {
		return result{Detail: said(err)}
	}
	defer socket.Close()
	if _, err := socket.Write([]byte(datagram)); err != nil {
		return result{Detail: said(err)}
	}
	buffer := make([]byte, 2048)
	socket.SetReadDeadline(time.Now().Add(wait))
	n, err := socket.Read(buffer)
	if err != nil {
		return result{Detail: said(err)}
	}
	pod, rest, _ := strings.Cut(string(buffer[:n]), " ")
	if rest != datagram {
		return result{Detail: fmt.Sprintf("odd datagram %q", buffer[:n])}
	}
	return result{Pod: pod}
}

// ---- streams: one connection, a request every so often, until it breaks or is stopped ---------------

type stream struct {
	connection net.Conn
	pause      time.Duration
	over       bool // the server has said so

	mu   sync.Mutex
	last time.Time // of the latest answer
	so   result    // so far
}

func (a *asker) begin(q question) result {
	connection, err := net.DialTimeout("tcp", q.target(), dialWait)
	if err != nil {
		return result{Detail: said(err)}
	}
	s := &stream{connection: connection, pause: seconds(q.Seconds), last: time.Now()}
	reader := bufio.NewReader(connection)
	connection.SetDeadline(time.Now().Add(dialWait))
	first := request(connection, reader, q)
	s.over = first.last
	if first.Detail != "" {
		connection.Close()
		return first
	}
	connection.SetDeadline(time.Time{})
	a.mu.Lock()
	a.streams[q.ID] = s
	a.mu.Unlock()
	go s.run(reader, q)
	return first
}

// run asks until the connection ends: by an error, or because look closed it.
func (s *stream) run(reader *bufio.Reader, q question) {
	for {
		time.Sleep(s.pause)
		answer := s.next(&reader, q)
		s.mu.Lock()
		s.so.Gap = max(s.so.Gap, time.Since(s.last).Seconds())
		s.last = time.Now()
		s.so.Pod, s.so.Detail = answer.Pod, answer.Detail
		if answer.Detail != "" {
			s.mu.Unlock()
			return
		}
		s.so.Answered++
		s.mu.Unlock()
	}
}

// next is one request, over another connection if the last answer was the last of that one.
func (s *stream) next(reader **bufio.Reader, q question) result {
	if s.over && q.Reopen {
		connection, err := net.DialTimeout("tcp", q.target(), dialWait)
		if err != nil {
			return result{Detail: said(err)}
		}
		s.mu.Lock()
		s.connection.Close()
		s.connection = connection
		s.mu.Unlock()
		*reader = bufio.NewReader(connection)
	}
	answer := request(s.connection, *reader, q)
	s.over = answer.last
	return answer
}

// look tells how a stream goes, and with "stop" ends it. A request under way counts as a gap.
func (a *asker) look(q question) result {
	a.mu.Lock()
	s, p := a.streams[q.Stream], a.pulses[q.Stream]
	if q.Op == "stop" {
		delete(a.streams, q.Stream)
		delete(a.pulses, q.Stream)
	}
	a.mu.Unlock()
	if p != nil {
		return p.look(q.Op == "stop")
	}
	if s == nil {
		return result{Detail: "no such stream"}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.so
	if r.Detail == "" {
		r.Gap = max(r.Gap, time.Since(s.last).Seconds())
	}
	if q.Op == "stop" {
		s.connection.Close()
	}
	return r
}
