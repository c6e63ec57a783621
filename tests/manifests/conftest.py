"""The server with everything applied."""

from manifests.installed import installed

__all__ = ["installed"]
