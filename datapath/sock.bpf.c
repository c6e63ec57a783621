// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
#include <tidegate/sock.h>

SEC("cgroup/connect4")
int connect4(struct bpf_sock_addr *ctx)
{
	return tg_sock_forward(ctx, 0, 0);
}

SEC("cgroup/connect6")
int connect6(struct bpf_sock_addr *ctx)
{
	return tg_sock_forward(ctx, 1, 0);
}

SEC("cgroup/sendmsg4")
int sendmsg4(struct bpf_sock_addr *ctx)
{
	return tg_sock_forward(ctx, 0, 1);
}

SEC("cgroup/sendmsg6")
int sendmsg6(struct bpf_sock_addr *ctx)
{
	return tg_sock_forward(ctx, 1, 1);
}

SEC("cgroup/recvmsg4")
int recvmsg4(struct bpf_sock_addr *ctx)
{
	return tg_sock_reverse(ctx, 0);
}

SEC("cgroup/recvmsg6")
int recvmsg6(struct bpf_sock_addr *ctx)
{
	return tg_sock_reverse(ctx, 1);
}

SEC("cgroup/getpeername4")
int getpeername4(struct bpf_sock_addr *ctx)
{
	return tg_sock_reverse(ctx, 0);
}

SEC("cgroup/getpeername6")
int getpeername6(struct bpf_sock_addr *ctx)
{
	return tg_sock_reverse(ctx, 1);
}

char _license[] SEC("license") = "Dual BSD/GPL";
