"""From objects that people write to the desired state of every node.

`manifests` reads, `world` is the frozen snapshot, `identities` gives numbers
(the one stateful step), `compile` is pure, `publish` writes what differs,
`standalone` runs them over a folder. Nothing here touches the kernel.
"""
