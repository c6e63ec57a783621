"""The command line against a cluster: its API, and the loader's pod on each node.

What a node's kernel holds is read by the very same commands inside the loader's pod (`--local`), by
exec; no port is opened. `kubernetes` (kubeconfig, credentials, exec) is imported here only, and
only when a cluster is meant. May not live here: reading maps, verdicts, what a table looks like.
"""
