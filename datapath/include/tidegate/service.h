/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* From a frontend to one of its backends; sockets and packets share it. */
#ifndef TIDEGATE_SERVICE_H
#define TIDEGATE_SERVICE_H

#include <tidegate/addr.h>
#include <tidegate/maps.h>

enum tg_service_answer {
	TG_SERVICE_NONE = 0,    /* not a frontend */
	TG_SERVICE_FOUND = 1,
	TG_SERVICE_EMPTY = 2,   /* a frontend without backends: refused */
	TG_SERVICE_SPECIAL = 3, /* ask `special.h` */
	TG_SERVICE_SILENT = 4,  /* no backend on this node, and only those would do: dropped */
	TG_SERVICE_RANGE = 5,   /* not for this client */
};

struct tg_choice {
	struct tg_addr addr;
	__be16 port;
	__u16 pad;
	__u32 backend; /* id */
	__u32 base;    /* of TG_SERVICE_SPECIAL: the frontend's */
	__u32 count;
};

tg_inline int tg_backend(__u32 id, __u8 protocol, struct tg_choice *choice)
{
	struct tg_backend *backend = bpf_map_lookup_elem(&backends_v1, &id);

	if (!backend || backend->state != TG_BACKEND_ACTIVE || backend->protocol != protocol)
		return TG_SERVICE_EMPTY;
	choice->addr = backend->addr;
	choice->port = backend->port;
	choice->backend = id;
	return TG_SERVICE_FOUND;
}

/* `hash` spreads over the backends: the same hash, the same backend, for as
 * long as the list does not change. */
tg_global int tg_service(const struct tg_frontend_key *asked, __u32 hash,
				 struct tg_choice *choice)
{
	struct tg_frontend_key key;
	struct tg_frontend frontend;
	__u16 proof;
	__u64 *word;
	__u32 slot, *id;
	int i;

	if (!asked || !choice)
		return TG_SERVICE_NONE;
	key = *asked; /* Linux 6.1 takes no key from an argument */
	proof = tg_frontend_proof(&key);
	/* A wrong proof: the element was recycled under us; look once more. */
	for (i = 0; i < 2; i++) {
		word = bpf_map_lookup_elem(&frontends_v1, &key);
		if (!word)
			return TG_SERVICE_NONE;
		*(__u64 *)&frontend = *(volatile __u64 *)word;
		if (frontend.proof == proof)
			break;
	}
	if (frontend.proof != proof)
		return TG_SERVICE_NONE;
	if (frontend.base > TG_FRONTEND_SLOT) {
		choice->base = frontend.base;
		choice->count = frontend.count;
		return TG_SERVICE_SPECIAL;
	}
	if (!frontend.count)
		return TG_SERVICE_EMPTY;
	slot = frontend.base + (__u32)((__u64)hash * frontend.count >> 32);
	id = bpf_map_lookup_elem(&slots_v1, &slot);
	if (!id)
		return TG_SERVICE_EMPTY;
	return tg_backend(*(volatile __u32 *)id, key.protocol, choice);
}

/* Once for each new flow or socket, never for a packet of a known one. Packets and
 * bytes are summed up when a flow ends, by who reads of it. */
tg_global int tg_service_count(const struct tg_frontend_key *asked, __u32 refused)
{
	struct tg_frontend_key key;
	struct tg_service_count *count, first = {};

	if (!asked)
		return 0;
	key = *asked;
	count = bpf_map_lookup_elem(&service_counts_v1, &key);
	if (!count) {
		bpf_map_update_elem(&service_counts_v1, &key, &first, BPF_NOEXIST);
		count = bpf_map_lookup_elem(&service_counts_v1, &key);
	}
	if (!count)
		return 0;
	if (refused)
		count->refused += 1;
	else
		count->connections += 1;
	return 0;
}

#endif
