"""The loader: one process a node that makes the kernel equal to the node's state.

    source -> maps -> plan -> apply     (attach and main around them)

`maps` and `plan` are pure. `kernel` reads and `apply` writes; nothing else
touches the kernel's maps. May not live here: anything that decides what a
policy means (the operator's compiler does), Kubernetes clients, asyncio,
pydantic; the process must idle below 40 MiB.
"""
