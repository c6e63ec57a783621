"""Filters as Hubble's API means them: rows of (filter, flow, whether it is shown)."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tidegate_observer import filters, labels, messages, told
from tidegate_observer.api import flow_pb2
from tidegate_observer.flow import End, Kind
from unit.observer.flows import ALLOW, APISERVER, SHOP_WEB, WORLD, flow, started

F = flow_pb2.FlowFilter

ROWS: list[tuple[str, F, dict[str, Any], bool]] = [
    ("an exact address", F(source_ip=["10.244.0.5"]), {}, True),
    ("another address", F(source_ip=["10.244.0.6"]), {}, False),
    ("a network", F(destination_ip=["10.244.1.0/24"]), {}, True),
    ("a network of the other family", F(source_ip=["::/0"]), {}, False),
    ("IPv6", F(source_ip=["fd00::/8"]), {"source_address": "fd00::5"}, True),
    ("one of several values", F(source_ip=["1.1.1.1", "10.244.0.5"]), {}, True),
    ("every field counts", F(source_ip=["10.244.0.5"], destination_port=["80"]), {}, False),
    ("a pod by prefix", F(source_pod=["shop/we"]), {}, True),
    ("a whole namespace", F(source_pod=["shop/"]), {}, True),
    ("no namespace is default", F(source_pod=["web"]), {}, False),
    ("any namespace", F(source_pod=["/web"]), {}, True),
    ("who is no pod", F(destination_pod=["/"]), {"destination": WORLD}, False),
    ("a label", F(source_label=["app=web"]), {}, True),
    ("a label with its source", F(source_label=["k8s:app=web"]), {}, True),
    ("a label of another source", F(source_label=["reserved:app=web"]), {}, False),
    ("in", F(source_label=["app in (api, web)"]), {}, True),
    ("notin", F(source_label=["app notin (api,web)"]), {}, False),
    ("no such label", F(source_label=["!tier"]), {}, True),
    ("two terms", F(source_label=["app=web,tier=edge"]), {}, False),
    ("reserved", F(source_label=["reserved:world"]), {"source": WORLD}, True),
    ("identity", F(destination_identity=[301]), {}, True),
    ("a reserved one has their number", F(source_identity=[7]), {"source": APISERVER}, True),
    ("another reserved one", F(source_identity=[4]), {"source": End(5)}, True),
    ("and not ours", F(source_identity=[3]), {"source": APISERVER}, False),
    ("workload", F(source_workload=[flow_pb2.Workload(name="web")]), {}, True),
    ("kind of workload", F(source_workload=[flow_pb2.Workload(kind="Job")]), {}, False),
    ("verdict", F(verdict=[flow_pb2.DROPPED]), {}, True),
    ("another verdict", F(verdict=[flow_pb2.FORWARDED, flow_pb2.AUDIT]), {}, False),
    ("protocol", F(protocol=["TCP"]), {}, True),
    ("icmp is both", F(protocol=["icmp"]), {"protocol": 58}, True),
    ("a protocol without a word", F(protocol=["vrrp"]), {"protocol": 112}, True),
    ("http is nobody's", F(protocol=["http"]), {}, False),
    ("port", F(destination_port=["5432"]), {}, True),
    ("ICMP has no port", F(destination_port=["5432"]), {"protocol": 1}, False),
    ("type", F(event_type=[flow_pb2.EventTypeFilter(type=1)]), {}, True),
    (
        "subtype",
        F(event_type=[flow_pb2.EventTypeFilter(type=1, match_sub_type=True, sub_type=181)]),
        {},
        False,
    ),
    ("reason", F(drop_reason_desc=[flow_pb2.POLICY_DENIED]), {}, True),
    ("a reason translated", F(drop_reason_desc=[flow_pb2.VLAN_FILTERED]), {"reason": 220}, True),
    ("direction", F(traffic_direction=[flow_pb2.INGRESS]), {}, True),
    ("IP version", F(ip_version=[flow_pb2.IPv6]), {}, False),
    (
        "an allowed flow's type",
        F(event_type=[flow_pb2.EventTypeFilter(type=5)]),
        {"kind": Kind.START, "ingress": ALLOW},
        True,
    ),
    (
        "a trace's type",
        F(event_type=[flow_pb2.EventTypeFilter(type=4, match_sub_type=True, sub_type=3)]),
        {"kind": Kind.TRACED, "point": 3},
        True,
    ),
    ("a traced reply", F(reply=[True]), {"kind": Kind.TRACED, "point": 3, "how": 3}, True),
    ("an audit", F(verdict=[flow_pb2.AUDIT]), {"kind": Kind.AUDITED}, True),
    ("not a reply", F(reply=[False]), {}, True),
    ("replies", F(reply=[True]), {}, False),
    ("flags", F(tcp_flags=[flow_pb2.TCPFlags(SYN=True)]), {}, True),
    ("all flags", F(tcp_flags=[flow_pb2.TCPFlags(SYN=True, ACK=True)]), {}, False),
    ("Service", F(destination_service=["shop/we"]), {"service": SHOP_WEB}, True),
    ("no Service", F(destination_service=["shop/web"]), {}, False),
    ("a Service is no source", F(source_service=["shop/web"]), {"service": SHOP_WEB}, False),
    ("node", F(node_name=["node-*"]), {}, True),
    ("node with cluster", F(node_name=["default/node-1"]), {}, True),
    ("node of another cluster", F(node_name=["other/"]), {}, False),
    ("interface", F(interface=[flow_pb2.NetworkInterface(index=3)]), {}, True),
    ("interface by name", F(interface=[flow_pb2.NetworkInterface(name="eth0")]), {}, True),
    ("another's name", F(interface=[flow_pb2.NetworkInterface(name="eth1")]), {}, False),
    ("one of both", F(interface=[flow_pb2.NetworkInterface(name="eth0", index=4)]), {}, False),
    ("no interface", F(interface=[flow_pb2.NetworkInterface()]), {}, False),
    ("DNS", F(dns_query=["."]), {}, False),
    ("cluster", F(source_cluster_name=["default"]), {}, True),
]


@pytest.mark.parametrize(("reason", "wanted", "fields", "shown"), ROWS, ids=[r[0] for r in ROWS])
def test_filters(reason: str, wanted: F, fields: dict[str, Any], shown: bool) -> None:
    assert filters.build([wanted], [])(flow(**fields)) == shown
    assert filters.build([], [wanted])(flow(**fields)) != shown
    # And of a flow of which there is only what was told of it.
    message = messages.flow_message(flow(**fields), "")
    assert filters.build([wanted], [])(told.told(message)) == shown


def test_lists() -> None:
    dropped, web = F(verdict=[flow_pb2.DROPPED]), F(source_pod=["shop/web"])
    assert filters.build([], [])(flow())
    assert filters.build([F(source_ip=["9.9.9.9"]), dropped], [])(flow())
    assert not filters.build([dropped], [web])(flow())
    assert filters.build([], [dropped])(started())


UNKNOWN = F.FromString(b"\xf8\x7f\x01")
REFUSED = [
    ("an unknown field", UNKNOWN, "2047"),
    ("one of an event's type", F.FromString(b"\x32\x03\xf8\x7f\x01"), "event_type, field 2047"),
    ("protocol", F(protocol=["tpc"]), "'tpc'"),
    ("port", F(source_port=["http"]), "'http'"),
    ("port too high", F(source_port=["65536"]), "65536"),
    ("address", F(source_ip=["10.0.0"]), "10.0.0"),
    ("selector", F(source_label=["app in (a"]), "app in"),
    ("empty selector", F(source_label=[""]), "empty"),
    ("name", F(source_fqdn=["a b"]), "a b"),
    ("too many", F(source_port=["1"] * 300), "256"),
    ("too long", F(source_pod=["x" * 2000]), "1024"),
]


@pytest.mark.parametrize(("reason", "wanted", "said"), REFUSED, ids=[r[0] for r in REFUSED])
def test_what_is_not_understood_is_refused(reason: str, wanted: F, said: str) -> None:
    with pytest.raises(filters.FilterError, match=said.replace("(", r"\(")):
        filters.build([wanted], [])


def test_every_field_of_a_filter_is_answered_or_refused() -> None:
    handled = set(filters._SPECIAL) | {"uuid"}
    handled |= {f"{end}_{name}" for end in ("source", "destination") for name in filters._ENDS}
    assert {field.name for field in F.DESCRIPTOR.fields} == handled


@given(st.text(max_size=60))
def test_a_selector_is_parsed_or_refused(text: str) -> None:
    try:
        selector = labels.parse(text)
    except ValueError:
        return
    assert selector(("k8s:app=web",)) in (True, False)
