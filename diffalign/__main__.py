"""`python -m diffalign` is the command `diffalign`, as `accelerate launch -m diffalign` needs it."""

import sys

from diffalign.cli import main

if __name__ == "__main__":  # workers that are spawned import this file too
    sys.exit(main())
