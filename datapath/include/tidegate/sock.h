/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Socket load balancing: a socket that asks for a frontend is connected to a
 * backend, and told that it talks to the frontend. No packet is touched.
 *
 * A v4-mapped IPv6 address is the same 128 bits as our form of the IPv4 one, so
 * the IPv6 hooks serve dual-stack sockets without a case of their own.
 */
#ifndef TIDEGATE_SOCK_H
#define TIDEGATE_SOCK_H

#include <linux/in.h>
#include <tidegate/special.h>

#define TG_ECONNREFUSED 111
#define TG_SOCK_PROCEED 1
#define TG_SOCK_REFUSE 0

/* Whether flows are counted and told of; denials always are. */
const volatile __u8 flow_events = 1;

tg_inline void tg_sock_read(struct bpf_sock_addr *ctx, int v6, struct tg_addr *addr)
{
	if (!v6) {
		tg_addr_v4(addr, ctx->user_ip4);
		return;
	}
	addr->w[0] = ctx->user_ip6[0];
	addr->w[1] = ctx->user_ip6[1];
	addr->w[2] = ctx->user_ip6[2];
	addr->w[3] = ctx->user_ip6[3];
}

tg_inline void tg_sock_write(struct bpf_sock_addr *ctx, int v6, const struct tg_addr *addr,
			     __be16 port)
{
	if (v6) {
		ctx->user_ip6[0] = addr->w[0];
		ctx->user_ip6[1] = addr->w[1];
		ctx->user_ip6[2] = addr->w[2];
		ctx->user_ip6[3] = addr->w[3];
	} else {
		ctx->user_ip4 = addr->w[3];
	}
	ctx->user_port = port;
}

tg_inline struct tg_stream *tg_stream(__u64 cookie)
{
	__u32 at = cookie & (TG_MAX_STREAMS - 1);

	return bpf_map_lookup_elem(&streams_v1, &at);
}

/* A stream has one peer, and its calls hold its lock, so its place has one
 * writer unless another socket with the same bits connects at the same moment:
 * then one of the two is not remembered. */
tg_inline void tg_stream_remember(__u64 cookie, const struct tg_choice *choice,
				  const struct tg_frontend_key *asked)
{
	struct tg_stream *stream = tg_stream(cookie);
	__u64 held;

	if (!stream)
		return;
	held = *(volatile __u64 *)&stream->cookie;
	if (held == TG_STREAM_BUSY ||
	    __sync_val_compare_and_swap(&stream->cookie, held, TG_STREAM_BUSY) != held)
		return;
	stream->backend = choice->addr;
	stream->frontend = asked->addr;
	stream->backend_port = choice->port;
	stream->frontend_port = asked->port;
	tg_barrier();
	*(volatile __u64 *)&stream->cookie = cookie;
}

/* Fills the frontend that the stream asked for, if it was sent to `addr`. */
tg_inline int tg_stream_asked(__u64 cookie, struct tg_addr *addr, __be16 *port)
{
	struct tg_stream *stream = tg_stream(cookie);
	struct tg_addr backend;
	__be16 backend_port;

	if (!stream || *(volatile __u64 *)&stream->cookie != cookie)
		return 0;
	tg_barrier();
	backend = stream->backend;
	backend_port = stream->backend_port;
	if (!tg_addr_equal(&backend, addr) || backend_port != *port)
		return 0;
	*addr = stream->frontend;
	*port = stream->frontend_port;
	tg_barrier();
	return *(volatile __u64 *)&stream->cookie == cookie;
}

/* Remembers which frontend the socket asked for, so that the peer's address
 * can be shown as that. */
tg_inline void tg_sock_remember(struct bpf_sock_addr *ctx, const struct tg_choice *choice,
				const struct tg_frontend_key *asked, int connects)
{
	struct tg_sock_key key = { .cookie = bpf_get_socket_cookie(ctx),
				   .addr = choice->addr, .port = choice->port };
	struct tg_sock value = { .cookie = key.cookie, .addr = asked->addr,
				 .port = asked->port,
				 .backend = connects ? choice->backend : 0 };

	bpf_map_update_elem(&socks_v1, &key, &value, BPF_ANY);
	key.addr = asked->addr;
	key.port = asked->port;
	value.addr = choice->addr;
	value.port = choice->port;
	value.backend = choice->backend;
	bpf_map_update_elem(&socks_v1, &key, &value, BPF_ANY);
}

/* Datagrams that a socket sends one after the other to a frontend go to one
 * backend, for as long as that lives. */
tg_inline int tg_sock_keeps(__u64 cookie, const struct tg_frontend_key *asked,
			    struct tg_choice *choice)
{
	struct tg_sock_key key = { .cookie = cookie, .addr = asked->addr, .port = asked->port };
	struct tg_sock *found = bpf_map_lookup_elem(&socks_v1, &key), held;
	struct tg_choice now = {};

	if (!found)
		return 0;
	held = *found;
	tg_barrier();
	if (*(volatile __u64 *)&found->cookie != cookie || held.cookie != cookie ||
	    tg_backend(held.backend, asked->protocol, &now) != TG_SERVICE_FOUND ||
	    !tg_addr_equal(&now.addr, &held.addr) || now.port != held.port)
		return 0;
	*choice = now;
	return 1;
}

/* A client is its network namespace: its address is not chosen yet. */
tg_inline int tg_sock_special(struct bpf_sock_addr *ctx, const struct tg_frontend_key *key,
			      struct tg_choice *choice)
{
	__u64 cookie = bpf_get_netns_cookie(ctx);
	struct tg_client client = { .hash = bpf_get_prandom_u32() };

	client.addr.w[0] = cookie >> 32;
	client.addr.w[1] = cookie;
	return tg_special(key, &client, choice, 0);
}

/* Who connects or sends: only here is it known. A program at an interface sees the
 * socket, and whoever reads what that tells of looks here by the cookie. */
tg_inline void tg_process_remember(struct bpf_sock_addr *ctx)
{
	__u64 cookie = bpf_get_socket_cookie(ctx), word, held;
	__u32 at = cookie & (TG_MAX_PROCESSES - 1);
	struct tg_process *place = bpf_map_lookup_elem(&processes_v1, &at);

	if (!place)
		return;
	word = cookie << TG_PROCESS_COOKIE | bpf_get_current_pid_tgid() >> 32;
	held = *(volatile __u64 *)&place->word;
	if (held == word || held == TG_PROCESS_BUSY ||
	    __sync_val_compare_and_swap(&place->word, held, TG_PROCESS_BUSY) != held)
		return;
	bpf_get_current_comm(place->name, sizeof(place->name));
	tg_barrier();
	*(volatile __u64 *)&place->word = word;
}

/* connect and, with `sends`, sendmsg */
tg_inline int tg_sock_forward(struct bpf_sock_addr *ctx, int v6, int sends)
{
	struct tg_frontend_key key = {};
	struct tg_choice choice = {};
	int answer;

	if (flow_events)
		tg_process_remember(ctx);
	tg_sock_read(ctx, v6, &key.addr);
	key.port = ctx->user_port;
	key.protocol = ctx->protocol;
	answer = tg_service(&key, bpf_get_prandom_u32(), &choice);
	if (answer == TG_SERVICE_SPECIAL)
		answer = tg_sock_special(ctx, &key, &choice);
	switch (answer) {
	case TG_SERVICE_NONE:
	case TG_SERVICE_SILENT: /* its packets are dropped, and counted, where they leave */
		return TG_SOCK_PROCEED;
	case TG_SERVICE_EMPTY:
		tg_service_count(&key, 1);
		/* As a user of kube-proxy expects: refused, not a time-out. */
		bpf_set_retval(-TG_ECONNREFUSED);
		return TG_SOCK_REFUSE;
	}
	/* A plain IPv6 frontend has IPv6 backends; a mapped one mapped ones. */
	if (!v6 && !tg_addr_is_v4(&choice.addr))
		return TG_SOCK_PROCEED;
	if (key.protocol != IPPROTO_TCP && sends &&
	    tg_sock_keeps(bpf_get_socket_cookie(ctx), &key, &choice)) {
		tg_sock_write(ctx, v6, &choice.addr, choice.port);
		return TG_SOCK_PROCEED;
	}
	tg_service_count(&key, 0);
	if (key.protocol == IPPROTO_TCP)
		tg_stream_remember(bpf_get_socket_cookie(ctx), &choice, &key);
	else
		tg_sock_remember(ctx, &choice, &key, !sends);
	tg_sock_write(ctx, v6, &choice.addr, choice.port);
	return TG_SOCK_PROCEED;
}

/* recvmsg and getpeername */
tg_inline int tg_sock_reverse(struct bpf_sock_addr *ctx, int v6)
{
	struct tg_sock_key key = { .cookie = bpf_get_socket_cookie(ctx) };
	struct tg_sock *found;
	struct tg_addr addr;
	__be16 port;

	tg_sock_read(ctx, v6, &key.addr);
	key.port = ctx->user_port;
	addr = key.addr;
	port = key.port;
	if (ctx->protocol == IPPROTO_TCP && tg_stream_asked(key.cookie, &addr, &port)) {
		tg_sock_write(ctx, v6, &addr, port);
		return TG_SOCK_PROCEED;
	}
	/* Streams too: those that an older version has translated. */
	found = bpf_map_lookup_elem(&socks_v1, &key);
	if (!found)
		return TG_SOCK_PROCEED;
	addr = found->addr;
	port = found->port;
	tg_barrier();
	if (*(volatile __u64 *)&found->cookie == key.cookie)
		tg_sock_write(ctx, v6, &addr, port);
	return TG_SOCK_PROCEED;
}

#endif
