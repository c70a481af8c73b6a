"""Key centers: each rank takes its own heads of its own layer, and a file that does not fit is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from turboquant_vllm.centers import read_center
from turboquant_vllm.errors import OptionError

CENTERS = torch.arange(3 * 4 * 16, dtype=torch.float32).view(3, 4, 16)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "centers.safetensors"
    save_file({"key_centers": CENTERS.half()}, path)
    return path


@pytest.mark.parametrize(("first", "heads"), [(0, 4), (2, 2), (3, 1)])
def test_a_rank_reads_its_heads(file: Path, first: int, heads: int) -> None:
    center = read_center(file, 1, 16, heads, first, 4)
    assert center.dtype == torch.float32
    assert torch.equal(center, CENTERS[1, first : first + heads])


@pytest.mark.parametrize(("layer", "head_dim", "all_heads"), [(3, 16, 4), (0, 32, 4), (0, 16, 8)])
def test_another_model_is_refused(file: Path, layer: int, head_dim: int, all_heads: int) -> None:
    with pytest.raises(OptionError, match=r"holds \(3, 4, 16\); layer \d of this model needs"):
        read_center(file, layer, head_dim, 2, 0, all_heads)


def test_a_file_without_the_tensor_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"centers": CENTERS}, path)
    with pytest.raises(OptionError, match="holds no tensor 'key_centers'"):
        read_center(path, 0, 16, 4, 0, 4)
    path.write_text("text")
    with pytest.raises(OptionError, match="holds no tensor 'key_centers'"):
        read_center(path, 0, 16, 4, 0, 4)
