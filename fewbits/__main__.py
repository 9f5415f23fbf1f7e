"""`python -m fewbits` is `fewbits`."""

import sys

from .cli.main import main

sys.exit(main())
