"""Where the tests of this directory compute."""

from __future__ import annotations

import os

DEVICE = os.environ.get("ROOTGRAFT_GPU_TESTS_ON", "cuda")
"""cpu: to see that the tests themselves are right; kernels are then compared with the references that they are."""
