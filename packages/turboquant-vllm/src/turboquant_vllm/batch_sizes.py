"""Batches that stand for all others where kernels are compiled ahead of serving."""

from __future__ import annotations

# Kernels change their form where there are more query vectors, or pieces of them, than a GPU has multiprocessors.
_EVERY = 160


def sizes(most: int) -> list[int]:
    """Sizes up to ``most`` among which every form of a kernel occurs that any size up to it takes.

    All the small ones; of the others the powers of two and the numbers after them.
    """
    powers = [1 << power for power in range(most.bit_length())]
    chosen = {most, *range(1, _EVERY), *powers, *(power + 1 for power in powers)}
    return sorted(size for size in chosen if size <= most)
