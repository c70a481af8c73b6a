"""Caches in files: what is loaded goes on as what was saved; anything else is one clear error."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import MistralConfig

from turboquant_hf import CacheFileError, TurboQuantCache, patch_model
from turboquant_hf.cache_file import DIGEST, digest
from turboquant_hf.compat import CACHE_ARGUMENT
from turboquant_hf.verify import decoded_twin

from .conftest import CONFIGS, GQA, build

OPTIONS: dict[str, Any] = {"page_size": 16, "sink_tokens": 2, "recent_tokens": 5, "center_keys": True}


def held(model: Any, ids: torch.Tensor, **options: Any) -> TurboQuantCache:
    cache = TurboQuantCache(model.config, 3, **options)
    with torch.no_grad():
        model(ids, **{CACHE_ARGUMENT: cache})
    return cache


@pytest.mark.parametrize("options", [{}, {"compress_v": False}, OPTIONS, {"start_after": 50}], ids=str)
def test_a_loaded_cache_goes_on_as_the_saved_one(
    llama: Any, prompt: torch.Tensor, tmp_path: Path, options: dict[str, Any]
) -> None:
    saved, loaded = held(llama, prompt, **options), TurboQuantCache(llama.config, 3, **options)
    saved.save(tmp_path / "cache")
    loaded.load(tmp_path / "cache")
    assert os.listdir(tmp_path) == ["cache"]
    assert loaded.get_seq_length() == 21
    assert loaded.memory().stored == saved.memory().stored
    with torch.no_grad():
        for width in (1, 3, 1):
            got, expected = (llama(prompt[:, :width], **{CACHE_ARGUMENT: c}).logits for c in (loaded, saved))
            assert torch.equal(got, expected)


@pytest.mark.parametrize("options", [{}, {"compress_v": False}, OPTIONS, {"start_after": 50}], ids=str)
def test_a_model_elsewhere_or_of_another_dtype(
    llama: Any, prompt: torch.Tensor, tmp_path: Path, options: dict[str, Any]
) -> None:
    """The file holds what one dtype and one device made; the model that goes on may have others."""
    held(llama.to(torch.bfloat16), prompt, **options).save(tmp_path / "cache")
    loaded, moved = (TurboQuantCache(llama.config, 3, **options) for _ in range(2))
    for cache in (loaded, moved):
        cache.load(tmp_path / "cache")
    for layer in moved.layers:
        layer.device = torch.device("meta")
    llama.to(torch.float32)
    expected = decoded_twin(TurboQuantCache(llama.config, 3, **options), llama.config)
    with torch.no_grad():
        llama(prompt, **{CACHE_ARGUMENT: expected})
        # Fused, and a chunk that is decoded.
        for width in (1, 3, 18, 1):
            ids = prompt[:, :width]
            got, also, want = (llama(ids, **{CACHE_ARGUMENT: c}).logits for c in (loaded, moved, expected))
            assert torch.equal(got, also)
            assert (got - want).norm() < 0.05 * want.norm()
    assert {layer.device.type for layer in moved.layers} == {"cpu"}
    assert moved.memory().stored == loaded.memory().stored


def test_sliding_layers(tmp_path: Path, prompt: torch.Tensor) -> None:
    model = build(MistralConfig(**GQA, sliding_window=8), "sdpa")
    saved = held(model, prompt, compress_sliding=True, page_size=16)
    loaded = TurboQuantCache(model.config, 3, compress_sliding=True, page_size=16)
    saved.save(tmp_path / "cache")
    loaded.load(tmp_path / "cache")
    with torch.no_grad():
        got, expected = (model(prompt[:, :2], **{CACHE_ARGUMENT: c}).logits for c in (loaded, saved))
    assert torch.equal(got, expected)


def test_generate_goes_on_and_still_knows_its_prompt(llama: Any, prompt: torch.Tensor, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    cache = patch_model(llama, verify=False)
    first = llama.generate(prompt, **{CACHE_ARGUMENT: cache}, **arguments)
    cache.save(tmp_path / "cache")
    more = torch.cat((first, prompt[:, :3]), 1)
    expected = llama.generate(more, **{CACHE_ARGUMENT: cache}, **arguments)
    loaded = patch_model(llama, verify=False)
    loaded.load(tmp_path / "cache")
    with pytest.raises(ValueError, match="does not begin with"):
        llama.generate(more + 1, **{CACHE_ARGUMENT: loaded}, **arguments)
    assert torch.equal(llama.generate(more, **{CACHE_ARGUMENT: loaded}, **arguments), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 4}, r"bits \[3, 3\] in layer 0; this cache has \[4, 4\]"),
        ({"seed": 1}, "seed 42; this cache has 1"),
        ({"page_size": 32}, "page_size 64; this cache has 32"),
        ({"recent_tokens": 2}, "windows"),
        ({"compress_v": False}, "packs_values True in layer 0; this cache has False"),
    ],
)
def test_other_options(llama: Any, prompt: torch.Tensor, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    held(llama, prompt).save(tmp_path / "cache")
    with pytest.raises(CacheFileError, match=message):
        TurboQuantCache(llama.config, **{"bits": 3, **options}).load(tmp_path / "cache")


def test_another_model(llama: Any, prompt: torch.Tensor, tmp_path: Path) -> None:
    held(llama, prompt).save(tmp_path / "cache")
    with pytest.raises(CacheFileError, match="has model"):
        TurboQuantCache(build(*CONFIGS["qwen3"]).config, 3).load(tmp_path / "cache")


def test_a_file_that_is_not_whole_or_not_ours(llama: Any, prompt: torch.Tensor, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    held(llama, prompt).save(path)
    whole = path.read_bytes()
    empty = TurboQuantCache(llama.config, 3)
    for broken in (b"", b"text", whole[:50], whole[:-1], whole[: len(whole) // 2], whole + b"x"):
        path.write_bytes(broken)
        with pytest.raises(CacheFileError, match=r"is not a whole packed cache \(.*\): save it again"):
            empty.load(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(CacheFileError, match="not a packed cache"):
        empty.load(path)
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nowhere: give the path of the file that save\(\)"):
        empty.load(tmp_path / "nowhere")
    with pytest.raises(CacheFileError, match="is a folder: give the path of the file"):
        empty.load(tmp_path)
    assert empty.get_seq_length() == 0


CHANGES = {
    "length": lambda header, tensors, metadata: header["layers"][1].update(packed=200),
    "fraction": lambda header, tensors, metadata: header["layers"][1].update(packed=1.5),
    "missing": lambda header, tensors, metadata: tensors.pop("1.pages"),
    "version": lambda header, tensors, metadata: metadata.update(version="2"),
    "layout": lambda header, tensors, metadata: header.update(layout_version=9),
    "layers": lambda header, tensors, metadata: header["layers"].pop(),
    "an empty layer": lambda header, tensors, metadata: header["layers"][0].pop("shape"),
    "tokens": lambda header, tensors, metadata: header["layers"][0].update(seen=7),
    "ids": lambda header, tensors, metadata: tensors.update(ids=torch.zeros(3, 4)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_header_that_lies(llama: Any, prompt: torch.Tensor, tmp_path: Path, change: str) -> None:
    path = tmp_path / "cache"
    held(llama, prompt).save(path)
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header = json.loads(metadata["header"])
    CHANGES[change](header, tensors, metadata)
    header[DIGEST] = digest(tensors)
    save_file(tensors, path, metadata={**metadata, "header": json.dumps(header)})
    cache = TurboQuantCache(llama.config, 3)
    with pytest.raises(CacheFileError, match=r"header says|format version 2|layout_version 9|the 2 layers"):
        cache.load(path)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("name", ["1.pages", "0.recent_keys", "0.sink_starts", "1.sink_values"])
def test_one_changed_bit(llama: Any, prompt: torch.Tensor, tmp_path: Path, name: str) -> None:
    path = tmp_path / "cache"
    held(llama, prompt, sink_tokens=2, recent_tokens=4).save(path)
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors[name].view(torch.uint8).view(-1)[5] ^= 1
    save_file(tensors, path, metadata=metadata)
    cache = TurboQuantCache(llama.config, 3, sink_tokens=2, recent_tokens=4)
    with pytest.raises(CacheFileError, match="holds other bytes than were saved"):
        cache.load(path)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize(
    "header", ["[]", "3", "null", "[" * 100_000, "{"], ids=["list", "number", "null", "deep", "part"]
)
def test_a_header_that_is_none(llama: Any, prompt: torch.Tensor, tmp_path: Path, header: str) -> None:
    path = tmp_path / "cache"
    held(llama, prompt).save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file({"x": torch.zeros(1)}, path, metadata={**metadata, "header": header})
    with pytest.raises(CacheFileError, match="is not a whole packed cache"):
        TurboQuantCache(llama.config, 3).load(path)


def test_a_failed_save_leaves_the_old_file(
    llama: Any, prompt: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = held(llama, prompt)
    cache.save(tmp_path / "cache")
    before = (tmp_path / "cache").read_bytes()

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("turboquant_hf.cache_file.save_file", full)
    with pytest.raises(OSError, match="no space"):
        cache.save(tmp_path / "cache")
    assert os.listdir(tmp_path) == ["cache"]
    assert (tmp_path / "cache").read_bytes() == before


def test_places_where_no_file_can_be(llama: Any, prompt: torch.Tensor, tmp_path: Path) -> None:
    cache = held(llama, prompt)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*missing, and nothing was saved: create it"):
        cache.save(tmp_path / "missing" / "cache")
    with pytest.raises(IsADirectoryError, match="is a folder, and nothing was saved: give the path of a file in it"):
        cache.save(tmp_path)
    assert os.listdir(tmp_path) == []


def test_layers_that_are_not_packed_are_named(prompt: torch.Tensor, tmp_path: Path) -> None:
    model = build(*CONFIGS["gemma2"])
    with pytest.raises(CacheFileError, match=r"layers 0 \(DynamicSlidingWindowLayer\) are not packed"):
        held(model, prompt).save(tmp_path / "cache")
