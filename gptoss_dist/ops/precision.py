"""The types that settings and command lines name."""

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Types by the names of `precision`."""
