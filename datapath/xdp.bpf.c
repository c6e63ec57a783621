// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
#define TG_XDP
#include <tidegate/xdp.h>

SEC("xdp")
int from_wire(struct xdp_md *ctx)
{
	return tg_xdp(ctx);
}

char _license[] SEC("license") = "Dual BSD/GPL";
