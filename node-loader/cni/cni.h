/* SPDX-License-Identifier: Apache-2.0 */
/* The CNI step: chained behind the plugin that makes a pod's interface. It hangs the pinned gate on
 * the host side before the pod runs, tells the node's loader of the pod, and returns once the
 * loader has the pod's policy in force. It decides nothing and keeps nothing.
 *
 *   main.c   commands of the CNI specification, their input and output
 *   net.c    the pod's interface and its host side, by netlink
 *   gate.c   the pinned programs and their links, by bpf(2)
 *   ask.c    one question to the loader, with an end
 *   pipe.c   no step: a Unix socket at standard input and output, for `kubectl exec`
 */
#ifndef TIDEGATE_CNI_H
#define TIDEGATE_CNI_H

#include <jansson.h>
#include <stdint.h>

#define MAC_TEXT 18
#define IFNAME_SIZE 16

/* Codes of the CNI specification, and our own from 100. */
enum {
	ERR_VERSION = 1,
	ERR_ENVIRONMENT = 4,
	ERR_IO = 5,
	ERR_DECODE = 6,
	ERR_CONFIG = 7,
	ERR_LATER = 11,
	ERR_UNAVAILABLE = 50,
	ERR_INTERFACE = 100,
	ERR_GATE = 101,
	ERR_REFUSED = 102,
};

/* Prints the error for the runtime and ends the process. */
__attribute__((noreturn, format(printf, 2, 3))) void fail(int code, const char *format, ...);

/* CLOCK_MONOTONIC, milliseconds. */
int64_t now_ms(void);
void sleep_ms(int64_t ms);

/* A pod's veth pair. */
struct pair {
	int ifindex; /* of the host side, in this process's network namespace */
	char ifname[IFNAME_SIZE];
	char host_mac[MAC_TEXT];
	char pod_mac[MAC_TEXT];
};

/* Finds the host side of interface `name` in network namespace `netns` (a path); fails with a reason. */
void find_pair(const char *netns, const char *name, struct pair *found);

/* Whether the gate's programs are pinned below `pin_dir`. */
int gate_pinned(const char *pin_dir);
/* Hangs the gate on an interface by tcx links, or renews it. 0: this kernel has no tcx, the loader does it. */
int gate_attach(const char *pin_dir, int ifindex);

/* Sends `question` to the loader as a line of JSON, again whenever the loader comes back, until it answers or `deadline`.
 * The answer's reference is the caller's; NULL: there was none, and `why` says it. */
json_t *ask(const char *socket_path, json_t *question, int64_t deadline, const char **why);

/* Joins the Unix socket `path` to standard input and output until the other side ends. The process's exit code. */
int pipe_to(const char *path);

#endif
