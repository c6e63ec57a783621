"""kopf, without what it would take along.

Where `kubernetes` is installed beside it, as in the image, kopf imports it, to know its
objects if it is ever given one: a third of our start, and more memory than kopf itself. It is
given none here.
"""

import sys
from typing import Any

_modules: dict[str, Any] = sys.modules
_hidden = "kubernetes" not in _modules
if _hidden:
    _modules["kubernetes"] = None  # importing it fails, as if it were not installed
try:
    import kopf
finally:
    if _hidden:
        del _modules["kubernetes"]

__all__ = ["kopf"]
