"""A small object compiled on the spot, for tests of `tidegate_bpf`."""

from __future__ import annotations

import functools
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

COMPILER = "clang-19"

SOURCE = r"""
#include <linux/bpf.h>
#include <linux/types.h>
#include <bpf/bpf_helpers.h>

struct t_addr { __be32 w[4]; };
struct t_inner { __u16 a; __be16 port; __u8 mac[6]; __u8 pad[2]; };
struct t_all {
	__u8 u8; __s8 s8; __u16 u16; __s16 s16; __u32 u32; __s32 s32; __u64 u64; __s64 s64;
	__be16 be16; __be32 be32;
	struct t_addr addr;
	struct t_inner one;
	struct t_inner two[2];
	__u32 many[3];
	__u8 last;
};
struct t_odd { void *pointer; };
enum t_signed { T_MINUS = -3, T_PLUS = 5 };
enum t_unsigned { T_BIG = 0xffffffff, T_HUNDRED = 133 };
struct t_anchors { struct t_all all; struct t_odd odd; enum t_signed s; enum t_unsigned u; };
struct t_anchors *anchors;

struct t_record { __u64 number; __u32 mark; __u32 pad; };

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, __u32);
	__type(value, struct t_all);
	__uint(max_entries, 16);
} table_v1 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 4);
	__type(key, __u32);
	__array(values, struct {
		__uint(type, BPF_MAP_TYPE_HASH);
		__type(key, __u32);
		__type(value, __u64);
		__uint(max_entries, 1);
	});
} outer_v1 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4096);
} ring_v1 SEC(".maps");

const volatile __u32 knob = 7;
const volatile __s16 negative = 1;
const volatile __u8 blob[4] = {1};

SEC("tc") int answer(struct __sk_buff *skb) { return knob; }
SEC("tc") int minus(struct __sk_buff *skb) { return negative; }
SEC("tc") int rewrite(struct __sk_buff *skb)
{
	__u8 byte = blob[0];
	skb->mark += 1;
	skb->cb[0] = skb->ingress_ifindex;
	bpf_skb_store_bytes(skb, 0, &byte, 1, 0);
	return 0;
}
SEC("tc") int emit(struct __sk_buff *skb)
{
	struct t_record *record = bpf_ringbuf_reserve(&ring_v1, sizeof(*record), 0);
	if (!record)
		return 1;
	record->number = skb->len;
	record->mark = skb->mark;
	record->pad = 0;
	if (skb->mark == 99)
		bpf_ringbuf_discard(record, 0);
	else
		bpf_ringbuf_submit(record, 0);
	return 0;
}
SEC("tc") int look(struct __sk_buff *skb)
{
	__u32 key = skb->mark;
	void *inner = bpf_map_lookup_elem(&outer_v1, &key);
	__u64 *value = inner ? bpf_map_lookup_elem(inner, &key) : 0;
	void *all = bpf_map_lookup_elem(&table_v1, &key);
	return (value ? *value : 0) + (all ? 1000 : 0);
}
SEC("?tc") int bad(struct __sk_buff *skb)
{
	__u32 *value = bpf_map_lookup_elem(&table_v1, &(__u32){ 1 });
	return *value;
}
SEC("cgroup/connect4") int refuse(struct bpf_sock_addr *ctx) { return 0; }
SEC("cgroup/connect4") int allow(struct bpf_sock_addr *ctx) { return 1; }
char t_license[] SEC("license") = "GPL";
"""


def compile_object(source: str, directory: Path) -> Path:
    """Compile C to `directory`/t.o. Skips the test when the compiler is missing."""
    compiler = shutil.which(COMPILER)
    if compiler is None:
        pytest.skip(f"missing tool: {COMPILER}")
    include = f"-I/usr/include/{platform.machine()}-linux-gnu"
    target = directory / "t.o"
    arguments = ["-O2", "-g", "-target", "bpf", "-mcpu=v3", include, "-x", "c", "-c", "-"]
    subprocess.run([compiler, *arguments, "-o", str(target)], input=source.encode(), check=True)
    return target


_kept: list[tempfile.TemporaryDirectory[str]] = []
"""Removed when the process ends."""


@functools.cache
def small_object() -> Path:
    """The object of SOURCE, compiled once a process."""
    directory = tempfile.TemporaryDirectory(prefix="tidegate-bpf-")
    _kept.append(directory)
    return compile_object(SOURCE, Path(directory.name))
