/* A TCP load generator without noise of its own: prints the median in
 * nanoseconds.
 *
 *   rr serve ADDRESS PORT            echoes, one connection at a time
 *   rr answer ADDRESS PORT           echoes one byte a connection and closes it
 *   rr rr ADDRESS PORT COUNT         one byte there and back, on one connection
 *   rr connect ADDRESS PORT COUNT    connect() until it returns
 *   rr first ADDRESS PORT COUNT      connect() until the first byte is back
 *   rr short ADDRESS PORT COUNT      the same until the server has closed, too */
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static long long now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ll + t.tv_nsec;
}

static int tcp_socket(void)
{
	int on = 1, fd = socket(AF_INET, SOCK_STREAM, 0);

	if (fd < 0)
		die("socket");
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
	return fd;
}

static void serve(const struct sockaddr_in *at, int bytes)
{
	int peer, left, fd = tcp_socket();
	char byte;

	if (bind(fd, (const void *)at, sizeof(*at)) || listen(fd, 1024))
		die("listen");
	for (;;) {
		peer = accept(fd, NULL, NULL);
		if (peer < 0)
			die("accept");
		for (left = bytes; left && read(peer, &byte, 1) == 1; left--)
			if (write(peer, &byte, 1) != 1)
				break;
		close(peer);
	}
}

static long long one_rr(int fd)
{
	long long began = now();
	char byte = 'x';

	if (write(fd, &byte, 1) != 1 || read(fd, &byte, 1) != 1)
		die("request");
	return now() - began;
}

/* A reset leaves no TIME_WAIT behind that would fill the port range. */
static long long one_connect(const struct sockaddr_in *to)
{
	struct linger reset = { .l_onoff = 1 };
	int fd = tcp_socket();
	long long began = now(), taken;

	if (connect(fd, (const void *)to, sizeof(*to)))
		die("connect");
	taken = now() - began;
	setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
	close(fd);
	return taken;
}

/* The server closes first, so that TIME_WAIT is its: the client's ports stay free. */
static long long one_answer(const struct sockaddr_in *to, int whole)
{
	struct linger reset = { .l_onoff = 1 };
	int fd = tcp_socket();
	long long began = now(), taken;
	char byte = 'x';

	if (connect(fd, (const void *)to, sizeof(*to)))
		die("connect");
	if (write(fd, &byte, 1) != 1 || read(fd, &byte, 1) != 1)
		die("request");
	if (whole && read(fd, &byte, 1))
		die("end");
	taken = now() - began;
	if (!whole)
		setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
	close(fd);
	return whole ? now() - began : taken;
}

static long long one(const char *mode, int fd, const struct sockaddr_in *to)
{
	if (!strcmp(mode, "rr"))
		return one_rr(fd);
	if (!strcmp(mode, "connect"))
		return one_connect(to);
	return one_answer(to, !strcmp(mode, "short"));
}

static int compare(const void *x, const void *y)
{
	long long a = *(const long long *)x, b = *(const long long *)y;

	return (a > b) - (a < b);
}

int main(int argc, char **argv)
{
	struct sockaddr_in to = { .sin_family = AF_INET };
	int i, count, fd = -1;
	long long *taken;

	if (argc < 4 || inet_pton(AF_INET, argv[2], &to.sin_addr) != 1)
		return 2;
	to.sin_port = htons(atoi(argv[3]));
	if (!strcmp(argv[1], "serve"))
		serve(&to, -1);
	if (!strcmp(argv[1], "answer"))
		serve(&to, 1);
	if (argc < 5)
		return 2;
	count = atoi(argv[4]);
	taken = calloc(count, sizeof(*taken));
	if (!taken || count < 1)
		return 2;
	if (!strcmp(argv[1], "rr")) {
		fd = tcp_socket();
		if (connect(fd, (const void *)&to, sizeof(to)))
			die("connect");
	}
	for (i = 0; i < count / 10; i++) /* warm up */
		one(argv[1], fd, &to);
	for (i = 0; i < count; i++)
		taken[i] = one(argv[1], fd, &to);
	qsort(taken, count, sizeof(*taken), compare);
	printf("%lld\n", taken[count / 2]);
	return 0;
}
