"""`python -m diffalign.cli` is the command `diffalign`."""

import sys

from diffalign.cli import main

sys.exit(main())
