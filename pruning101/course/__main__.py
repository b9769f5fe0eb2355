"""`python -m pruning101.course` is the command `pruning101`."""

import sys

from .cli import main

sys.exit(main())
