"""Normal numbers from a written recurrence, the same in every release of NumPy and torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri


def normal_numbers(count: int, seed: int) -> NDArray[np.float64]:
    """``count`` independent N(0, 1) numbers.

    Number ``i`` is the normal quantile of ``(u_i + 1/2) / 2**53``, ``u_i`` the top 53 bits of output ``i`` of
    Philox 4x64-10 with the key ``seed``: NumPy keeps the outputs of a bit generator, not those of its ``normal``.
    """
    outputs = np.random.Philox(key=seed).random_raw(count) >> np.uint64(11)
    return np.asarray(ndtri((outputs.astype(np.float64) + 0.5) * 2.0**-53))
