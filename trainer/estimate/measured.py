"""What has no formula: bytes that libraries take once they work, beyond what they took when they were imported.

The only numbers in the estimate that were fitted or assumed. Of a CPU: fitted to one configuration of
`python -m benchmarks.estimate` (FITTED_ON), and judged there on all others. Of a GPU nothing was measured: its number
is an allowance for CUDA's context, cuBLAS' and NCCL's buffers and the caching allocator's losses, no more.

glibc's malloc keeps freed blocks below 32 MB and, before glibc 2.38, often cannot use them again for tensors. That is
no need of the run, has no formula and varies from run to run, so it is not included: see README, "Will it fit?".
"""

from typing import Literal

DeviceKind = Literal["cpu", "cuda"]

# (ranks, base.quantization, train.activation_checkpointing, experts.parallel_size)
FITTED_ON = (1, "nf4", False, 1)
LIBRARIES: dict[DeviceKind, int] = {"cpu": 41_000_000, "cuda": 1024**3}
