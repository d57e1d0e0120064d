"""`python -m moe_route` is `moe-route`."""

import sys

from moe_route.cli import main

if __name__ == "__main__":
    sys.exit(main())
