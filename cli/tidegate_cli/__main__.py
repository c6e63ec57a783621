"""`python -m tidegate_cli`."""

from __future__ import annotations

import sys

from tidegate_cli.main import main

sys.exit(main())
