/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/if_link.h>
#include <linux/net_namespace.h>
#include <linux/rtnetlink.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include "cni.h"

#define NO_NSID (-1)

struct link {
	int ifindex;
	int peer; /* IFLA_LINK, an index in the peer's namespace */
	int nsid; /* of the peer's namespace */
	char name[IFNAME_SIZE];
	char kind[IFNAME_SIZE];
	unsigned char mac[6];
};

struct request {
	struct nlmsghdr header;
	union {
		struct ifinfomsg link;
		struct rtgenmsg any;
	};
	char attributes[64];
};

static int open_netlink(void)
{
	struct timeval patience = { .tv_sec = 2 };
	int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);

	if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience)))
		fail(ERR_IO, "cannot open a netlink socket: %s", strerror(errno));
	return fd;
}

static void append(struct request *request, int type, const void *data, size_t size)
{
	struct rtattr *attribute = (void *)((char *)request + NLMSG_ALIGN(request->header.nlmsg_len));

	attribute->rta_type = type;
	attribute->rta_len = RTA_LENGTH(size);
	memcpy(RTA_DATA(attribute), data, size);
	request->header.nlmsg_len = NLMSG_ALIGN(request->header.nlmsg_len) + RTA_ALIGN(attribute->rta_len);
}

/* Returns 0 and the answer, or an errno. */
static int exchange(int fd, struct request *request, char *answer, size_t room, struct nlmsghdr **found)
{
	struct nlmsghdr *header = (void *)answer;
	ssize_t got;

	if (send(fd, request, request->header.nlmsg_len, 0) < 0)
		return errno;
	do
		got = recv(fd, answer, room, 0);
	while (got < 0 && errno == EINTR);
	if (got < 0)
		return errno;
	if (!NLMSG_OK(header, (unsigned)got))
		return EPROTO;
	if (header->nlmsg_type == NLMSG_ERROR)
		return -((struct nlmsgerr *)NLMSG_DATA(header))->error;
	*found = header;
	return 0;
}

static void text_of(char *to, const struct rtattr *attribute)
{
	size_t size = RTA_PAYLOAD(attribute);

	if (size >= IFNAME_SIZE)
		size = IFNAME_SIZE - 1;
	memcpy(to, RTA_DATA(attribute), size);
	to[size] = 0;
}

static void read_kind(struct link *link, struct rtattr *info)
{
	struct rtattr *inner = RTA_DATA(info);
	int left = RTA_PAYLOAD(info);

	for (; RTA_OK(inner, left); inner = RTA_NEXT(inner, left))
		if (inner->rta_type == IFLA_INFO_KIND)
			text_of(link->kind, inner);
}

static void read_link(struct link *link, struct nlmsghdr *header)
{
	struct ifinfomsg *info = NLMSG_DATA(header);
	struct rtattr *attribute = IFLA_RTA(info);
	int left = IFLA_PAYLOAD(header);

	memset(link, 0, sizeof(*link));
	link->ifindex = info->ifi_index;
	link->nsid = NO_NSID;
	for (; RTA_OK(attribute, left); attribute = RTA_NEXT(attribute, left)) {
		switch (attribute->rta_type) {
		case IFLA_IFNAME:
			text_of(link->name, attribute);
			break;
		case IFLA_LINK:
			memcpy(&link->peer, RTA_DATA(attribute), sizeof(link->peer));
			break;
		case IFLA_LINK_NETNSID:
			memcpy(&link->nsid, RTA_DATA(attribute), sizeof(link->nsid));
			break;
		case IFLA_ADDRESS:
			if (RTA_PAYLOAD(attribute) == sizeof(link->mac))
				memcpy(link->mac, RTA_DATA(attribute), sizeof(link->mac));
			break;
		case IFLA_LINKINFO:
			read_kind(link, attribute);
			break;
		}
	}
}

/* By name, or by index where `name` is NULL. Returns an errno. */
static int get_link(int fd, const char *name, int ifindex, struct link *link)
{
	struct request request = {
		.header = { .nlmsg_len = NLMSG_LENGTH(sizeof(struct ifinfomsg)),
			    .nlmsg_type = RTM_GETLINK,
			    .nlmsg_flags = NLM_F_REQUEST },
		.link = { .ifi_index = ifindex },
	};
	static char answer[1 << 16] __attribute__((aligned(NLMSG_ALIGNTO)));
	struct nlmsghdr *header = NULL;
	int error;

	if (name)
		append(&request, IFLA_IFNAME, name, strnlen(name, IFNAME_SIZE - 1) + 1);
	error = exchange(fd, &request, answer, sizeof(answer), &header);
	if (!error)
		read_link(link, header);
	return error;
}

/* This namespace's number for the one behind `netns`; NO_NSID: it has none. */
static int get_nsid(int fd, int netns)
{
	struct request request = {
		.header = { .nlmsg_len = NLMSG_LENGTH(sizeof(struct rtgenmsg)),
			    .nlmsg_type = RTM_GETNSID,
			    .nlmsg_flags = NLM_F_REQUEST },
	};
	static char answer[4096] __attribute__((aligned(NLMSG_ALIGNTO)));
	struct nlmsghdr *header = NULL;
	struct rtattr *attribute;
	int left, nsid = NO_NSID;

	append(&request, NETNSA_FD, &netns, sizeof(netns));
	if (exchange(fd, &request, answer, sizeof(answer), &header))
		return NO_NSID;
	attribute = (void *)((char *)NLMSG_DATA(header) + NLMSG_ALIGN(sizeof(struct rtgenmsg)));
	left = NLMSG_PAYLOAD(header, sizeof(struct rtgenmsg));
	for (; RTA_OK(attribute, left); attribute = RTA_NEXT(attribute, left))
		if (attribute->rta_type == NETNSA_NSID)
			memcpy(&nsid, RTA_DATA(attribute), sizeof(nsid));
	return nsid;
}

/* A netlink socket that speaks for the namespace behind `netns`; the process returns home. */
static int open_netlink_in(int netns)
{
	int fd, home = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);

	if (home < 0 || setns(netns, CLONE_NEWNET))
		fail(ERR_IO, "cannot enter the pod's network namespace: %s", strerror(errno));
	fd = open_netlink();
	if (setns(home, CLONE_NEWNET))
		fail(ERR_IO, "cannot return to the node's network namespace: %s", strerror(errno));
	close(home);
	return fd;
}

static void mac_text(char *to, const unsigned char *mac)
{
	snprintf(to, MAC_TEXT, "%02x:%02x:%02x:%02x:%02x:%02x", mac[0], mac[1], mac[2], mac[3], mac[4],
		 mac[5]);
}

void find_pair(const char *netns, const char *name, struct pair *found)
{
	int space = open(netns, O_RDONLY | O_CLOEXEC), inside, outside, error;
	struct link pod, host;

	if (space < 0)
		fail(ERR_ENVIRONMENT, "cannot open CNI_NETNS %s: %s", netns, strerror(errno));
	inside = open_netlink_in(space);
	outside = open_netlink();
	error = get_link(inside, name, 0, &pod);
	if (error)
		fail(ERR_INTERFACE, "the pod has no interface %s (the plugins before this one make it): %s",
		     name, strerror(error));
	if (strcmp(pod.kind, "veth"))
		fail(ERR_INTERFACE, "%s of the pod is %s%s, not one end of a veth pair: Tidegate gates veth pairs only",
		     name, pod.kind[0] ? "a " : "no virtual link", pod.kind);
	error = get_link(outside, NULL, pod.peer, &host);
	/* An index says nothing by itself: the other end must look back, into this very namespace. */
	if (error || strcmp(host.kind, "veth") || host.peer != pod.ifindex || host.nsid == NO_NSID ||
	    host.nsid != get_nsid(outside, space))
		fail(ERR_INTERFACE, "the other end of the pod's %s is not in the node's network namespace", name);
	found->ifindex = host.ifindex;
	memcpy(found->ifname, host.name, IFNAME_SIZE);
	mac_text(found->host_mac, host.mac);
	mac_text(found->pod_mac, pod.mac);
	close(inside);
	close(outside);
	close(space);
}
