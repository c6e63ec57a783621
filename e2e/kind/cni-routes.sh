#!/bin/bash
# The network between nodes that a cluster without kindnet needs, at every start of a node: a route to
# each other node's pods, and masquerading of what leaves the cluster. Nodes are looked up by name, as
# their addresses may change with a restart. What is addressed to a Service and was not translated
# goes nowhere: it must not leave the machine, and a test shall see it fail.
# Lines of the file: node, range of its pods. Arguments: the file, this node, the ranges of all pods
# and of Services.
set -euo pipefail
file=$1 self=$2 cluster=$3 services=$4

ip route replace unreachable "$services"

address() { getent ahostsv4 "$1" | awk '{ print $1; exit }'; }

while read -r node range; do
  if [[ $node == "$self" ]]; then
    rule=(POSTROUTING -s "$range" ! -d "$cluster" -j MASQUERADE)
    iptables -t nat -C "${rule[@]}" 2> /dev/null || iptables -t nat -A "${rule[@]}"
    continue
  fi
  # Whoever starts first waits for the others.
  until via=$(address "$node") && [[ -n $via ]]; do sleep 0.5; done
  ip route replace "$range" via "$via"
done < "$file"
