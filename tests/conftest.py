"""Tests that run side by side (``pytest -n 2``) get one thread each.

Threads of several processes on the same cores spin while they wait for each other: small networks
then take ten times as long. This is read before torch is imported, and by all child processes.
"""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
