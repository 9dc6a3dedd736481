"""Contiguous packing: samples are runs of tokens, whatever documents they cross.

Shapes: N samples, T = seq_len.
"""

import numpy as np

from data_pipeline.batches.reading import Spans
from data_pipeline.batches.token_split import TokenSplit


class TokenDataset(TokenSplit):
    """Contiguous packing: sample i is tokens [i*T, i*T + T] of the split.

    Each token is predicted once per epoch, bar an incomplete sample at the end, and documents begin and end anywhere in
    a sample. Attributes and errors are those of `TokenSplit`.
    """

    packing = "contiguous"

    def _count_samples(self) -> int:
        samples = max(self.tokens_total - 1, 0) // self.seq_len
        self.inputs_total = samples * self.seq_len
        return samples

    def samples(self, positions: np.ndarray) -> np.ndarray:
        """Return tokens int64 [N, T+1] at global positions, int64 [N]."""
        return self.read(self.order(positions))

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Return tokens int64 [N, T+1] of samples by index, in the order of the text."""
        arrays = self.micro_batch(indices)
        return np.concatenate([arrays["input_ids"], arrays["labels"][:, -1:]], axis=1)

    def spans(self, indices: np.ndarray) -> Spans:
        """Return one span for each sample."""
        ones = np.ones_like(indices)
        return Spans(indices * self.seq_len, ones * self.seq_len, ones)
