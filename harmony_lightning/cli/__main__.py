"""`python -m harmony_lightning.cli` is `harmony`."""

import sys

from harmony_lightning.cli import main

sys.exit(main())
