"""What the ways cost in which a mixed batch can be computed; all thresholds are here.

    masked-dense    every adapter on every row, and what a sample has no share in times 0:
                    max(Σ rᵢ, m) S T + Σ rᵢ c
    gathered        each sample's k factors picked, and a product for each sample:
                    S (max(k r, m) a T + k r p) + Σ rᵢ q

in multiply-adds for each feature, in and out: S samples of T rows, rᵢ the adapters' ranks, r the
widest. Without gradients, kernels on a GPU read each sample's factors where they lie, whatever the
sizes. c: copying and casting factors of all adapters; a: a small product is slower than a large
one; p: picking; q: stacking what is picked from; m: a product with fewer columns takes as long as
with m, the time of reading its rows.

`cpu`: fitted to the best times of float32 products, forward, at widths 512 and 2048 on one core,
r = 16, 2 to 64 adapters, 8 or 32 samples of 1 to 128 rows; of these the choice is right wherever
one way takes 1.5 times as long as the other.

`cuda`: m is less than the 200 columns that an H100 multiplies (600 TFLOP/s) while it reads their
rows (3 TB/s), and such that 8 adapters of rank 16, trained on 8 × 1024 rows, are masked, which was
not the slower way (`tests/benchmarks/mixed_batch.py --train --adapters 8`). Else not measured: p is
the time in which an H100 reads a float32 factor, writes and reads it in bfloat16, 8 bytes at 3.0
TB/s, over that of one multiply-add at a third of 790 TFLOP/s. 64 samples of 128 rows are gathered
from Σ rᵢ > 170, and single rows hardly ever. In kernels, 64 adapters take 1.11 times the base's
time there, gathered 1.31 (`mixed_batch.py --slots`, H100, two layers of Llama 3 8B).
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Costs:
    """The constants of one kind of device: see above."""

    c: float
    a: float
    p: float
    q: float
    m: int


DEVICES = {"cpu": Costs(c=5, a=1.5, p=5, q=0, m=0), "cuda": Costs(c=330, a=1, p=330, q=330, m=128)}


def is_gathered(device: str, samples: int, rows: int, ranks: Sequence[int], terms: int) -> bool:
    """Whether to pick factors for each of the samples, of so many rows, is the cheaper way.

    `ranks` are those of the adapters, of which a sample has at most `terms`. On a device that is
    not known it never is.
    """
    costs = DEVICES.get(device)
    if costs is None or len(ranks) < 2:
        return False
    total = sum(ranks)
    masked = max(total, costs.m) * samples * rows + total * costs.c
    own = min(terms, len(ranks)) * max(ranks)
    picked = samples * (max(own, costs.m) * costs.a * rows + own * costs.p)
    return picked + total * costs.q < masked
