"""Imported before torch: its threads sleep while they wait, unless the environment or an earlier import of
torch says otherwise.

By default they spin, and hold the cores that other work needs: converting the demo model beside one busy
process took 82 seconds instead of 2. On idle cores waking costs little. OMP_WAIT_POLICY: OpenMP 5.0, 6.7.
"""

import os
import sys

if "torch" not in sys.modules:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
