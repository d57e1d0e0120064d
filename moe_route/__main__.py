"""Run the command line: `python -m moe_route` is the same as `moe-route`."""

import sys

from moe_route.cli import main

if __name__ == "__main__":
    sys.exit(main())
