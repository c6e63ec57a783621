"""`python -m tidegate_loader`."""

import os
import sys

from tidegate_loader.main import main

code = main()
sys.stdout.flush()
sys.stderr.flush()
# Everything is in the kernel and in files: do not take a hundred thousand objects apart first.
os._exit(code)
