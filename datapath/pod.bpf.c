// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
#include <tidegate/pod.h>

SEC("tc")
int from_pod(struct __sk_buff *skb)
{
	return tg_pod(skb, 1);
}

SEC("tc")
int to_pod(struct __sk_buff *skb)
{
	return tg_pod(skb, 0);
}

char _license[] SEC("license") = "Dual BSD/GPL";
