"""What all tests share: one thread a process, and hypothesis without clocks.

HYPOTHESIS_PROFILE=explore draws new examples at every run; the default repeats the same ones.
"""

from __future__ import annotations

import os

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("repeat", deadline=None, derandomize=True, database=None, max_examples=50)
settings.register_profile("explore", deadline=None, database=None, max_examples=300, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeat"))
