"""`python -m tidegate_observer`."""

import sys

from tidegate_observer.main import main

if __name__ == "__main__":
    sys.exit(main())
