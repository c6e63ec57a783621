"""The words that all parts of Tidegate speak.

`state` holds the machine-written kinds (msgspec: the loader must stay slim),
`users` the kinds that people write (pydantic). Nothing here does I/O, knows a
clock, or imports another Tidegate package.
"""

GROUP = "tidegate.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
