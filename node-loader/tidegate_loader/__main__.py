"""`python -m tidegate_loader`, and what `tidegate-loader` runs."""

import gc
import os
import sys
from typing import NoReturn

gc.disable()  # what is imported stays: `main` says from when on there is something to collect

from tidegate_loader.main import main  # noqa: E402


def run() -> NoReturn:
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything is in the kernel and in files: do not take a hundred thousand objects apart first.
    os._exit(code)


if __name__ == "__main__":
    run()
