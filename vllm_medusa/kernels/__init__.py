"""Triton kernels of a step with draft trees: torch and triton only, no vLLM.

Their oracles are in ``tests/kernels/oracles.py``. All kernels take persistent tensors of the device
and launch without reading a value of them on the host, so they can run in a CUDA graph.

Common terms:

request index
    place of a request in the step's batch, ``b``; ``idx_mapping[b]`` is its *state index*, which it
    keeps while it runs.
node
    0 is the root, ``1..N`` the draft nodes, parents before children. At most `MAX_NODES` with the
    root, because a node's ancestors are a bitmask of 64 bits.
base
    position of a request's root, which is also the number of keys in front of the tree. Node ``i``
    is in the slot of position ``base + i`` and has position ``base + depth``.
    A request without a tree in a step has base `NO_TREE`, and its attention is causal.
"""

MAX_NODES = 64
NO_TREE = 2**30
