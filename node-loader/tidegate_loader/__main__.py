"""`python -m tidegate_loader`."""

import sys

from tidegate_loader.main import main

sys.exit(main())
