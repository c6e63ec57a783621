"""What can go wrong with the cluster on one machine.

StandaloneError              its text is one line for people, with the remedy
├── PrerequisiteError        this machine lacks something
├── AlreadyUpError           another supervisor holds the run directory
├── NotUpError               there is no cluster in the run directory
├── NetworkError             the kernel refused a link, address, route or namespace
└── ReadinessError           a loader did not realise its state in time
"""

from __future__ import annotations

from tidegate_cli.errors import CliError


class StandaloneError(CliError):
    pass


class PrerequisiteError(StandaloneError):
    pass


class AlreadyUpError(StandaloneError):
    pass


class NotUpError(StandaloneError):
    pass


class NetworkError(StandaloneError):
    pass


class ReadinessError(StandaloneError):
    pass
