"""`python -m tidegate_operator`: the operator in a cluster."""

import sys

from tidegate_operator.cluster.main import main

if __name__ == "__main__":
    sys.exit(main())
