// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
#include <tidegate/masquerade.h>

SEC("tc")
int from_net(struct __sk_buff *skb)
{
	return tg_from_net(skb);
}

SEC("tc")
int to_net(struct __sk_buff *skb)
{
	return tg_to_net(skb);
}

char _license[] SEC("license") = "Dual BSD/GPL";
