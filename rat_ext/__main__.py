"""``python -m rat_ext`` is ``rat-ext``, also under ``torchrun -m rat_ext``."""

import sys

from .cli import main

sys.exit(main())
