"""Principal components of vectors that come in batches."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fx.adapters.init.randomised import randomised_svd


class PrincipalComponents:
    """The `count` components of largest variance of all vectors seen, one batch after another.

    Ross et al. 2008, Incremental Learning for Robust Visual Tracking, §3.1: the SVD of what is
    known and of the new vectors, each about its own mean, and of how far the means lie apart.
    `components` (count, in) are orthonormal, `singular_values` and `ratios`, their shares of the
    variance, fall. `similarity` is that of each component to what it was a batch ago.
    """

    components: Tensor
    singular_values: Tensor
    ratios: Tensor
    similarity: Tensor

    def __init__(self, count: int, generator: torch.Generator) -> None:
        self.count = count
        self.seen = 0
        self._generator = generator

    def add(self, vectors: Tensor) -> None:
        """Take in a batch (n, in) of at least `count` vectors."""
        n, mean = len(vectors), vectors.mean(0)
        centred = vectors - mean
        squares = centred.square().sum()
        rows = centred
        if self.seen:
            apart = self._mean - mean
            weight = self.seen * n / (self.seen + n)
            known = self.singular_values[:, None] * self.components
            rows = torch.cat([known, centred, weight**0.5 * apart[None]])
            squares = squares + self._squares + weight * apart.square().sum()
            mean = mean + apart * self.seen / (self.seen + n)
        wanted = min(2 * self.count, *rows.shape)
        _, S, V = randomised_svd(rows, wanted, 4, self._generator)
        before = self.components if self.seen else None
        self.seen, self._mean, self._squares = self.seen + n, mean, squares
        self.components, self.singular_values = V[: self.count], S[: self.count]
        self.ratios = self.singular_values.square() / squares.clamp(min=torch.finfo(S.dtype).tiny)
        if before is not None:
            self.similarity = F.cosine_similarity(self.components, before).abs()
        else:
            self.similarity = torch.zeros(self.count, device=S.device)
