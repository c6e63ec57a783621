#!/bin/bash
# The network between nodes that a cluster without kindnet needs, at every start of a node: routes to
# each other node's pods, and masquerading of what leaves the cluster. Nodes are looked up by name, as
# their addresses may change with a restart. What is addressed to a Service and was not translated
# goes nowhere: it must not leave the machine, and a test shall see it fail.
# Lines of the file: node, its pods' IPv4 and IPv6 ranges. Arguments: the file, this node, the ranges
# of all pods and of Services, IPv4 first.
set -euo pipefail
file=$1 self=$2 pods4=$3 pods6=$4 services4=$5 services6=$6

address() { getent "ahostsv$1" "$2" | awk '{ print $1; exit }'; }

# masquerade IPTABLES OWN-RANGE ALL-PODS
masquerade() {
  local rule=(POSTROUTING -s "$2" ! -d "$3" -j MASQUERADE)
  "$1" -t nat -C "${rule[@]}" 2> /dev/null || "$1" -t nat -A "${rule[@]}"
}

# route FAMILY NODE RANGE: whoever starts first waits for the others
route() {
  local via
  until via=$(address "$1" "$2") && [[ -n $via ]]; do sleep 0.5; done
  ip "-$1" route replace "$3" via "$via"
}

ip -4 route replace unreachable "$services4"
ip -6 route replace unreachable "$services6"
while read -r node range4 range6; do
  if [[ $node == "$self" ]]; then
    masquerade iptables "$range4" "$pods4"
    masquerade ip6tables "$range6" "$pods6"
  else
    route 4 "$node" "$range4"
    route 6 "$node" "$range6"
  fi
done < "$file"
