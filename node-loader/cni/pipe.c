/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "cni.h"

static int failed(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, strerror(errno));
	return 1;
}

/* What can be read now, all of it written. 0: it has ended; -1: errno says why. */
static ssize_t move(int from, int to)
{
	char data[1 << 16];
	ssize_t got, put;

	do
		got = read(from, data, sizeof(data));
	while (got < 0 && errno == EINTR);
	for (ssize_t done = 0; done < got; done += put) {
		put = write(to, data + done, got - done);
		if (put < 0 && errno == EINTR)
			put = 0;
		if (put < 0)
			return -1;
	}
	return got;
}

int pipe_to(const char *path)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	struct pollfd ends[2] = { { .fd = STDIN_FILENO, .events = POLLIN }, { .events = POLLIN } };
	int fd = ends[1].fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (strlen(path) >= sizeof(address.sun_path)) {
		errno = ENAMETOOLONG;
		return failed(path);
	}
	strcpy(address.sun_path, path);
	if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof(address)))
		return failed(path);
	for (;;) {
		ssize_t moved;

		if (poll(ends, 2, -1) < 0) {
			if (errno == EINTR)
				continue;
			return failed("poll");
		}
		if (ends[1].revents) {
			moved = move(fd, STDOUT_FILENO);
			if (moved <= 0)
				return moved ? failed(path) : 0;
		}
		if (ends[0].revents) {
			moved = move(STDIN_FILENO, fd);
			if (moved < 0)
				return failed(path);
			if (!moved) { /* who asked has gone; what is under way may still come */
				shutdown(fd, SHUT_WR);
				ends[0].fd = -1;
			}
		}
	}
}
