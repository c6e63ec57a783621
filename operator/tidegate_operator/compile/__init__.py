"""World and ledger -> desired state of every node. Pure: no I/O, no clock, no chance.

`compile` is the meaning; `Compiler` gives byte for byte the same result, remembering
what did not change. Nothing here remembers an earlier *output* for its own sake: what it
keeps is only ever a cache of a function of (world, ledger).
"""

from tidegate_operator.compile.compiler import Compiler, Desired, NodeContent, compile

__all__ = ["Compiler", "Desired", "NodeContent", "compile"]
