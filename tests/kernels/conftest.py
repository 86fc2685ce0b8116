"""Without Triton, and a GPU or its interpreter, there is nothing to collect: see `make test-v2`."""

import os
from importlib.util import find_spec

import torch

if find_spec("triton") is None or not (
    torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
):
    collect_ignore_glob = ["test_*"]
