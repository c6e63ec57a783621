/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <limits.h>
#include <linux/bpf.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "cni.h"

#define LINK_TCX 11 /* BPF_LINK_TYPE_TCX; headers of Linux 6.1 do not know it */

/* tc's ingress at the host side is what leaves the pod. */
static const struct hook {
	const char *program, *direction;
	unsigned attach_type; /* BPF_TCX_INGRESS, BPF_TCX_EGRESS */
} hooks[] = {
	{ "from_pod", "ingress", 46 },
	{ "to_pod", "egress", 47 },
};

/* A prefix of struct bpf_link_info, as it is for tcx. */
struct tcx_info {
	__u32 type, id, prog_id, unused;
	__u32 ifindex, attach_type;
};

static int bpf(int command, union bpf_attr *attr)
{
	return syscall(SYS_bpf, command, attr, sizeof(*attr));
}

static int obj_get(const char *path)
{
	union bpf_attr attr = { .pathname = (__u64)(unsigned long)path };

	return bpf(BPF_OBJ_GET, &attr);
}

static int obj_pin(int fd, const char *path)
{
	union bpf_attr attr = { .pathname = (__u64)(unsigned long)path, .bpf_fd = fd };

	return bpf(BPF_OBJ_PIN, &attr);
}

static int link_create(int program, int ifindex, unsigned attach_type)
{
	union bpf_attr attr = {
		.link_create = { .prog_fd = program, .target_fd = ifindex, .attach_type = attach_type },
	};

	return bpf(BPF_LINK_CREATE, &attr);
}

static int link_update(int link, int program)
{
	union bpf_attr attr = { .link_update = { .link_fd = link, .new_prog_fd = program } };

	return bpf(BPF_LINK_UPDATE, &attr);
}

/* The interface a pinned link is on; 0: none, or it is gone. */
static int link_target(int link)
{
	struct tcx_info info = { 0 };
	union bpf_attr attr = {
		.info = { .bpf_fd = link, .info_len = sizeof(info), .info = (__u64)(unsigned long)&info },
	};

	return bpf(BPF_OBJ_GET_INFO_BY_FD, &attr) || info.type != LINK_TCX ? 0 : (int)info.ifindex;
}

static const char *link_path(char *path, const char *pin_dir, int ifindex, const struct hook *hook)
{
	snprintf(path, PATH_MAX, "%s/links/%d-%s", pin_dir, ifindex, hook->direction);
	return path;
}

int gate_pinned(const char *pin_dir)
{
	char path[PATH_MAX];
	struct stat found;

	for (unsigned i = 0; i < sizeof(hooks) / sizeof(*hooks); i++) {
		snprintf(path, sizeof(path), "%s/progs/%s", pin_dir, hooks[i].program);
		if (stat(path, &found)) {
			if (errno == ENOENT || errno == ENOTDIR)
				return 0;
			fail(ERR_GATE, "cannot look at %s: %s", path, strerror(errno));
		}
	}
	return 1;
}

/* Replaces what is pinned there in one rename, as the loader does. */
static void pin_over(int link, const char *path)
{
	char temporary[PATH_MAX + 8];

	snprintf(temporary, sizeof(temporary), "%s_new", path);
	unlink(temporary);
	if (obj_pin(link, temporary) || rename(temporary, path))
		fail(ERR_GATE, "cannot pin the gate's link at %s: %s", path, strerror(errno));
}

/* 0: this kernel has no tcx. */
static int attach(const char *pin_dir, int ifindex, const struct hook *hook)
{
	char path[PATH_MAX];
	int program, link;

	snprintf(path, sizeof(path), "%s/progs/%s", pin_dir, hook->program);
	program = obj_get(path);
	if (program < 0)
		fail(ERR_GATE, "cannot open the gate's program %s: %s", path, strerror(errno));
	link = obj_get(link_path(path, pin_dir, ifindex, hook));
	if (link < 0 || link_target(link) != ifindex || link_update(link, program)) {
		if (link >= 0)
			close(link);
		link = link_create(program, ifindex, hook->attach_type);
		if (link < 0 && errno == EINVAL)
			return 0;
		if (link < 0)
			fail(ERR_GATE, "cannot attach %s to interface %d: %s", hook->program, ifindex,
			     strerror(errno));
		pin_over(link, path);
	}
	close(link);
	close(program);
	return 1;
}

int gate_attach(const char *pin_dir, int ifindex)
{
	for (unsigned i = 0; i < sizeof(hooks) / sizeof(*hooks); i++)
		if (!attach(pin_dir, ifindex, &hooks[i]))
			return 0;
	return 1;
}
