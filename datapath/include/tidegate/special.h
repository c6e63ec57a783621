/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Frontends that ask for more than one of their backends: affinity, source
 * ranges, other backends for clients from outside. Plain ones never come here. */
#ifndef TIDEGATE_SPECIAL_H
#define TIDEGATE_SPECIAL_H

#include <tidegate/conntrack.h>
#include <tidegate/service.h>

struct tg_client {
	struct tg_addr addr; /* of a socket: its network namespace's cookie */
	__u32 outside;       /* it came in at an uplink */
	__u32 hash;          /* spreads clients over backends */
};

tg_inline __u32 tg_slot(__u32 at)
{
	__u32 *slot = bpf_map_lookup_elem(&slots_v1, &at);

	return slot ? *(volatile __u32 *)slot : 0;
}

tg_inline __u64 tg_affinity_proof(const struct tg_affinity_key *key)
{
	__u32 h = tg_mix(tg_addr_proof(&key->client) ^ key->service * 0x9E3779B1u ^ key->outside);

	return (__u64)(h & ((1u << TG_AFFINITY_PROOF) - 1)) << TG_AFFINITY_PROOF;
}

/* Whether `id` is among count slots from `base`, which are sorted. */
tg_global int tg_is_member(__u32 base, __u32 count, __u32 id)
{
	__u32 low = 0, high = count;
	int i;

	for (i = 0; i < 17; i++) {
		__u32 middle = (low + high) / 2, found;

		if (low >= high)
			return 0;
		found = tg_slot(base + middle);
		if (found == id)
			return 1;
		if (found < id)
			low = middle + 1;
		else
			high = middle;
	}
	return 0;
}

/* The backend that the client was last sent to, if that is not too long ago; 0: none. */
tg_inline __u32 tg_remembered(const struct tg_affinity_key *key, __u32 seconds)
{
	const __u64 mask = (1ull << TG_AFFINITY_PROOF) - 1;
	__u64 *found = bpf_map_lookup_elem(&affinity_v1, key), word;
	__u16 age;

	if (!found)
		return 0;
	word = *(volatile __u64 *)found;
	if ((word ^ tg_affinity_proof(key)) & (mask << TG_AFFINITY_PROOF))
		return 0;
	age = (tg_now() >> TG_AFFINITY_UNIT) - (word >> TG_AFFINITY_SEEN);
	return age > seconds >> TG_AFFINITY_UNIT ? 0 : word & mask;
}

tg_inline void tg_remember(const struct tg_affinity_key *key, __u32 backend)
{
	__u64 word = backend | tg_affinity_proof(key) |
		     (__u64)(tg_now() >> TG_AFFINITY_UNIT) << TG_AFFINITY_SEEN;

	bpf_map_update_elem(&affinity_v1, key, &word, BPF_ANY);
}

tg_inline int tg_in_ranges(__u32 service, const struct tg_addr *addr)
{
	struct tg_range key = { .bits = 32 + 128, .service = bpf_htonl(service), .addr = *addr };

	return bpf_map_lookup_elem(&source_ranges_v1, &key) != NULL;
}

/* Whether a client outside may use a frontend that has TG_FRONTEND_RANGES. `base`:
 * of the frontend. */
tg_global int tg_may_ask(__u32 base, const struct tg_addr *addr)
{
	struct tg_addr client;

	if (!addr)
		return 0;
	client = *addr;
	return tg_in_ranges(tg_slot((base & TG_FRONTEND_SLOT) + TG_SLOT_SERVICE), &client);
}

/* Of a frontend that `tg_service` called special: one of its backends, for this
 * client. Nothing is remembered with `dry`. An enum tg_service_answer. */
tg_global int tg_special(const struct tg_frontend_key *asked, const struct tg_client *client,
			 struct tg_choice *choice, int dry)
{
	struct tg_affinity_key key = {};
	__u32 base, flags, count, seconds = 0, elsewhere = 0, id = 0;
	__u8 protocol;
	int found;

	if (!asked || !client || !choice)
		return TG_SERVICE_NONE;
	base = choice->base & TG_FRONTEND_SLOT;
	flags = choice->base >> TG_FRONTEND_FLAGS;
	count = choice->count;
	protocol = asked->protocol;
	if (client->outside && !(flags & TG_FRONTEND_OUTSIDE))
		return TG_SERVICE_NONE;
	if (flags & TG_FRONTEND_HEADER) {
		key.service = tg_slot(base + TG_SLOT_SERVICE);
		seconds = tg_slot(base + TG_SLOT_AFFINITY);
		elsewhere = tg_slot(base + TG_SLOT_ELSEWHERE);
		if (client->outside && (flags & TG_FRONTEND_TWO)) {
			__u32 inside = count;

			count = tg_slot(base + TG_SLOT_OUTSIDE);
			base += inside;
		}
		base += TG_SLOT_HEADER;
	}
	if (client->outside && (flags & TG_FRONTEND_RANGES) &&
	    !tg_in_ranges(key.service, &client->addr))
		return TG_SERVICE_RANGE;
	if (!count)
		return elsewhere ? TG_SERVICE_SILENT : TG_SERVICE_EMPTY;
	if (flags & TG_FRONTEND_AFFINITY) {
		key.client = client->addr;
		key.outside = client->outside && (flags & TG_FRONTEND_TWO);
		id = tg_remembered(&key, seconds);
		if (id && !(flags & TG_FRONTEND_RING) && !tg_is_member(base, count, id))
			id = 0;
	}
	found = id ? tg_backend(id, protocol, choice) : TG_SERVICE_EMPTY;
	if (found != TG_SERVICE_FOUND)
		found = tg_backend(tg_slot(base + (__u32)((__u64)client->hash * count >> 32)),
				   protocol, choice);
	if (found == TG_SERVICE_FOUND && (flags & TG_FRONTEND_AFFINITY) && !dry)
		tg_remember(&key, choice->backend);
	return found;
}

#endif
