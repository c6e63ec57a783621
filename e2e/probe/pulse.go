// SPDX-License-Identifier: Apache-2.0

package main

import (
	"sync"
	"time"
)

const pulseWait = 300 * time.Millisecond

// pulse asks by UDP every so often, each time from a new socket, and keeps for each pod that answered
// when the first and the latest question that it answered were sent: Unix time in nanoseconds. The
// first is forgotten by every look.
type pulse struct {
	end chan struct{}

	mu    sync.Mutex
	heard map[string][2]int64
}

func (a *asker) beat(q question) result {
	p := &pulse{end: make(chan struct{}), heard: map[string][2]int64{}}
	a.mu.Lock()
	a.pulses[q.ID] = p
	a.mu.Unlock()
	q.Protocol, q.Op = "UDP", "probe"
	every := seconds(q.Seconds)
	go func() {
		ticks := time.NewTicker(every)
		defer ticks.Stop()
		for {
			select {
			case <-p.end:
				return
			case <-ticks.C:
				go p.once(q)
			}
		}
	}()
	return result{}
}

func (p *pulse) once(q question) {
	sent := time.Now().UnixNano()
	answer := echoOnce(q, pulseWait)
	if answer.Pod == "" {
		return
	}
	pod := answer.Pod
	p.mu.Lock()
	defer p.mu.Unlock()
	times := p.heard[pod]
	if times[0] == 0 || sent < times[0] {
		times[0] = sent
	}
	times[1] = max(times[1], sent)
	p.heard[pod] = times
}

func (p *pulse) look(stop bool) result {
	p.mu.Lock()
	defer p.mu.Unlock()
	heard := map[string][2]int64{}
	for pod, times := range p.heard {
		heard[pod] = times
		p.heard[pod] = [2]int64{0, times[1]}
	}
	if stop {
		close(p.end)
	}
	return result{Heard: heard}
}
