/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "cni.h"

#define NEWEST "1.1.0"
#define MAX_INPUT (4 << 20)
#define POLL_MS 50
#define GOODBYE_MS 1000 /* the loader notices by itself, too */
#define PROBE_MS 2000

static const char *const versions[] = { "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0" };
#define VERSIONS (sizeof(versions) / sizeof(*versions))

struct step {
	json_t *config;
	const char *version, *pin_dir, *socket, *enforcing;
	int64_t deadline;
};

struct pod {
	char *uid, *namespace, *name;
};

static const char *spoken = NEWEST;

void fail(int code, const char *format, ...)
{
	char text[1024];
	json_t *error;
	va_list arguments;

	va_start(arguments, format);
	vsnprintf(text, sizeof(text), format, arguments);
	va_end(arguments);
	error = json_pack("{s:s, s:i, s:s+}", "cniVersion", spoken, "code", code, "msg", "tidegate: ",
			  text);
	if (error)
		json_dumpf(error, stdout, JSON_COMPACT);
	else /* what the message quotes is not UTF-8 */
		printf("{\"cniVersion\":\"%s\",\"code\":%d,\"msg\":\"tidegate: see the node's log\"}", spoken,
		       code);
	putchar('\n');
	fprintf(stderr, "tidegate-cni: %s\n", text);
	exit(1);
}

int64_t now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

void sleep_ms(int64_t ms)
{
	struct timespec time = { .tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000 };

	nanosleep(&time, NULL);
}

static void print(json_t *value)
{
	json_dumpf(value, stdout, JSON_COMPACT);
	putchar('\n');
}

static const char *text_or(json_t *object, const char *key, const char *otherwise)
{
	json_t *found = json_object_get(object, key);

	if (!found)
		return otherwise;
	if (!json_is_string(found))
		fail(ERR_CONFIG, "%s must be a string", key);
	return json_string_value(found);
}

/* ---- input ------------------------------------------------------------------------------------ */

static json_t *read_config(void)
{
	char *text = malloc(MAX_INPUT + 1);
	size_t size = text ? fread(text, 1, MAX_INPUT + 1, stdin) : 0;
	json_error_t error;
	json_t *config;

	if (!text || ferror(stdin))
		fail(ERR_IO, "cannot read the configuration: %s", strerror(errno));
	if (size > MAX_INPUT)
		fail(ERR_DECODE, "the configuration is larger than %d bytes", MAX_INPUT);
	config = json_loadb(text, size, JSON_REJECT_DUPLICATES, &error);
	free(text);
	if (!config)
		fail(ERR_DECODE, "the configuration is not JSON: %s at line %d", error.text, error.line);
	if (!json_is_object(config))
		fail(ERR_DECODE, "the configuration is not an object");
	return config;
}

static void check_version(const char *version)
{
	for (unsigned i = 0; i < VERSIONS; i++) {
		if (!strcmp(version, versions[i])) {
			spoken = versions[i];
			return;
		}
	}
	fail(ERR_VERSION, "cniVersion %s is not supported; %s to %s are", version, versions[0], NEWEST);
}

static struct step read_step(void)
{
	struct step step = { .config = read_config() };
	json_t *timeout = json_object_get(step.config, "timeoutSeconds");
	json_int_t seconds = timeout ? json_integer_value(timeout) : 10;

	step.version = text_or(step.config, "cniVersion", "0.3.0");
	check_version(step.version);
	if (seconds < 1 || seconds > 100)
		fail(ERR_CONFIG, "timeoutSeconds must be an integer from 1 to 100");
	step.pin_dir = text_or(step.config, "pinDir", "/sys/fs/bpf/tidegate");
	step.socket = text_or(step.config, "socket", "/run/tidegate/cni.sock");
	step.enforcing = text_or(step.config, "enforcingFile", "");
	step.deadline = now_ms() + seconds * 1000;
	return step;
}

static const char *environment(const char *name)
{
	const char *value = getenv(name);

	if (!value || !*value)
		fail(ERR_ENVIRONMENT, "%s is not set", name);
	return value;
}

/* One value of CNI_ARGS ("KEY=VALUE;…"), the caller's to free; NULL: it is not there. */
static char *argument(const char *key)
{
	const char *at = getenv("CNI_ARGS");
	size_t size = strlen(key);

	while (at && *at) {
		size_t length = strcspn(at, ";");

		if (length > size && !strncmp(at, key, size) && at[size] == '=')
			return strndup(at + size + 1, length - size - 1);
		at += length + (at[length] == ';');
	}
	return NULL;
}

/* 0: what is set up is no pod of Kubernetes. */
static int read_pod(struct pod *pod)
{
	pod->name = argument("K8S_POD_NAME");
	pod->namespace = argument("K8S_POD_NAMESPACE");
	pod->uid = argument("K8S_POD_UID");
	if (!pod->name || !pod->namespace)
		return 0;
	if (!pod->uid)
		fail(ERR_ENVIRONMENT,
		     "CNI_ARGS has no K8S_POD_UID for pod %s/%s: the container runtime is too old (containerd gives it from 1.6 on)",
		     pod->namespace, pod->name);
	return 1;
}

static json_t *previous(const struct step *step)
{
	json_t *found = json_object_get(step->config, "prevResult");

	if (!json_is_object(found))
		fail(ERR_CONFIG, "there is no prevResult: tidegate-cni must come after the plugin that makes the pod's interface");
	return found;
}

/* Whether address `ip` of prevResult belongs to the pod's interface `name`. */
static int is_ours(json_t *interfaces, json_t *ip, const char *name)
{
	json_t *at = json_object_get(ip, "interface"), *found;

	if (!json_is_integer(at))
		return 1;
	found = json_array_get(interfaces, json_integer_value(at));
	return *text_or(found, "sandbox", "") && !strcmp(text_or(found, "name", ""), name);
}

/* The pod's addresses, without prefix lengths. */
static json_t *addresses(json_t *result, const char *name)
{
	json_t *found = json_array(), *ip;
	size_t index;

	json_array_foreach(json_object_get(result, "ips"), index, ip) {
		const char *text = text_or(ip, "address", "");

		if (*text && is_ours(json_object_get(result, "interfaces"), ip, name))
			json_array_append_new(found, json_stringn(text, strcspn(text, "/")));
	}
	if (!json_array_size(found))
		fail(ERR_CONFIG, "prevResult names no address of %s", name);
	return found;
}

/* ---- commands --------------------------------------------------------------------------------- */

static json_t *question(const char *command, const struct pod *pod, const struct pair *pair, json_t *ips)
{
	json_t *made = json_pack("{s:s, s:{s:s, s:s, s:s, s:s, s:i, s:s, s:s, s:O}}", "command", command,
				 "interface", "uid", pod->uid, "namespace", pod->namespace, "name",
				 pod->name, "ifname", pair->ifname, "ifindex", pair->ifindex, "podMac",
				 pair->pod_mac, "hostMac", pair->host_mac, "addresses", ips);

	if (!made)
		fail(ERR_ENVIRONMENT, "CNI_ARGS is not UTF-8");
	return made;
}

static void put(const struct step *step, const char *command, const struct pod *pod,
		const struct pair *pair, json_t *ips)
{
	const char *why = NULL;
	json_t *answer = ask(step->socket, question(command, pod, pair, ips), step->deadline, &why);

	if (!answer)
		fail(ERR_LATER, "pod %s/%s: %s", pod->namespace, pod->name, why);
	if (!json_is_true(json_object_get(answer, "ok")))
		fail(ERR_REFUSED, "pod %s/%s: %s", pod->namespace, pod->name,
		     text_or(answer, "error", "the loader refused it and gave no reason"));
}

/* Whether there is a gate to hang. Where the loader has enforced before and its programs are gone, as after a reboot,
 * they come back: until then no pod starts. */
static int await_gate(const struct step *step)
{
	while (!gate_pinned(step->pin_dir)) {
		if (!*step->enforcing || access(step->enforcing, F_OK))
			return 0;
		if (now_ms() + POLL_MS >= step->deadline)
			fail(ERR_LATER,
			     "Tidegate enforces policy on this node and its loader has not loaded the programs yet (is the pod of DaemonSet tidegate-loader on this node running?)");
		sleep_ms(POLL_MS);
	}
	return 1;
}

static void add(const struct step *step)
{
	const char *netns = environment("CNI_NETNS"), *name = environment("CNI_IFNAME");
	json_t *result = previous(step);
	struct pair pair;
	struct pod pod;

	if (read_pod(&pod) && await_gate(step)) {
		find_pair(netns, name, &pair);
		gate_attach(step->pin_dir, pair.ifindex);
		put(step, "ADD", &pod, &pair, addresses(result, name));
	}
	json_object_set_new(result, "cniVersion", json_string(step->version));
	print(result);
}

static void check(const struct step *step)
{
	const char *netns = environment("CNI_NETNS"), *name = environment("CNI_IFNAME");
	json_t *result = previous(step);
	struct pair pair;
	struct pod pod;

	if (!read_pod(&pod) || !await_gate(step))
		return;
	find_pair(netns, name, &pair);
	put(step, "CHECK", &pod, &pair, addresses(result, name));
}

/* Never fails for what is not there any more. */
static void del(const struct step *step)
{
	const char *why = NULL;
	struct pod pod;
	json_t *bye;

	if (!read_pod(&pod) || !gate_pinned(step->pin_dir))
		return;
	bye = json_pack("{s:s, s:s}", "command", "DEL", "uid", pod.uid);
	if (bye)
		ask(step->socket, bye, now_ms() + GOODBYE_MS, &why);
}

static void status(const struct step *step)
{
	if (!gate_pinned(step->pin_dir) && *step->enforcing && !access(step->enforcing, F_OK))
		fail(ERR_UNAVAILABLE, "Tidegate enforces policy on this node and its loader has not loaded the programs yet");
}

static void print_versions(void)
{
	json_t *list = json_array();

	for (unsigned i = 0; i < VERSIONS; i++)
		json_array_append_new(list, json_string(versions[i]));
	print(json_pack("{s:s, s:o}", "cniVersion", NEWEST, "supportedVersions", list));
}

/* The kubelet's probe of the loader, one small process instead of an interpreter. */
static int alive(const char *socket)
{
	const char *why = NULL, *error;
	json_t *answer = ask(socket, json_pack("{s:s}", "command", "ALIVE"), now_ms() + PROBE_MS, &why);

	if (answer && json_is_true(json_object_get(answer, "ok")))
		return 0;
	error = json_string_value(json_object_get(answer, "error"));
	fprintf(stderr, "%s\n", error ? error : why ? why : "no answer");
	return 1;
}

int main(int count, char **arguments)
{
	const char *command;
	struct step step;

	if (count == 3 && !strcmp(arguments[1], "alive"))
		return alive(arguments[2]);
	if (count == 3 && !strcmp(arguments[1], "pipe"))
		return pipe_to(arguments[2]);
	command = environment("CNI_COMMAND");
	if (!strcmp(command, "VERSION")) {
		print_versions();
		return 0;
	}
	step = read_step();
	if (!strcmp(command, "ADD"))
		add(&step);
	else if (!strcmp(command, "CHECK"))
		check(&step);
	else if (!strcmp(command, "DEL"))
		del(&step);
	else if (!strcmp(command, "STATUS"))
		status(&step);
	else if (strcmp(command, "GC")) /* nothing of ours outlives a pod's interface: the loader sees it go */
		fail(ERR_ENVIRONMENT, "CNI_COMMAND %s is unknown", command);
	return fflush(stdout) ? 1 : 0;
}
