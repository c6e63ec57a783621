/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "cni.h"

#define RETRY_MS 100
#define MAX_ANSWER (1 << 16)

static const char *const NOT_THERE =
	"the Tidegate loader of this node does not answer (is the pod of DaemonSet tidegate-loader on this node running?)";

static int connect_to(const char *path)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

	if (strlen(path) >= sizeof(address.sun_path))
		fail(ERR_CONFIG, "the socket's path is too long: %s", path);
	strcpy(address.sun_path, path);
	if (fd >= 0 && connect(fd, (struct sockaddr *)&address, sizeof(address))) {
		close(fd);
		return -1;
	}
	return fd;
}

/* Whether `fd` became ready for `events` before the deadline. */
static int ready(int fd, short events, int64_t deadline)
{
	struct pollfd one = { .fd = fd, .events = events };
	int64_t left;

	while ((left = deadline - now_ms()) > 0) {
		int got = poll(&one, 1, (int)left);

		if (got > 0)
			return 1;
		if (got < 0 && errno != EINTR)
			return 0;
	}
	return 0;
}

static int send_all(int fd, const char *data, size_t size, int64_t deadline)
{
	while (size) {
		ssize_t sent = send(fd, data, size, MSG_NOSIGNAL);

		if (sent < 0 && errno != EAGAIN && errno != EINTR)
			return -1;
		if (sent < 0 && !ready(fd, POLLOUT, deadline))
			return -1;
		if (sent > 0)
			data += sent, size -= sent;
	}
	return 0;
}

/* The line, without its end; NULL: the loader went away, or said nothing in time. */
static const char *receive_line(int fd, int64_t deadline)
{
	static char line[MAX_ANSWER];
	size_t used = 0;

	while (used < sizeof(line) - 1 && ready(fd, POLLIN, deadline)) {
		ssize_t got = recv(fd, line + used, sizeof(line) - 1 - used, 0);
		char *end;

		if (got < 0 && (errno == EAGAIN || errno == EINTR))
			continue;
		if (got <= 0)
			return NULL;
		end = memchr(line + used, '\n', got);
		used += got;
		if (end) {
			*end = 0;
			return line;
		}
	}
	return NULL;
}

/* The answer; NULL: none this time. */
static json_t *ask_once(const char *path, json_t *question, int64_t deadline)
{
	int fd = connect_to(path);
	json_t *answer = NULL;
	const char *line = NULL;
	size_t size;
	char *text;

	if (fd < 0)
		return NULL;
	/* The loader, which knows why, shall be the one to give up first. */
	json_object_set_new(question, "waitMs", json_integer((deadline - now_ms()) * 9 / 10));
	text = json_dumps(question, JSON_COMPACT);
	/* In one piece: who has read the object may answer and hang up before a late newline. */
	size = text ? strlen(text) : 0;
	if (text)
		text[size++] = '\n';
	if (text && !send_all(fd, text, size, deadline))
		line = receive_line(fd, deadline);
	if (line)
		answer = json_loads(line, 0, NULL);
	free(text);
	close(fd);
	return answer;
}

json_t *ask(const char *path, json_t *question, int64_t deadline, const char **why)
{
	json_t *answer;

	do {
		answer = ask_once(path, question, deadline);
		if (answer)
			return answer;
		sleep_ms(RETRY_MS);
	} while (now_ms() + RETRY_MS < deadline);
	*why = NOT_THERE;
	return NULL;
}
