"""What is refused of an engine before its weights are read, and of pages before the first request."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from turboquant_core.preset import Fingerprint, Preset, save_preset
from turboquant_vllm.errors import OptionError, UnsupportedError
from turboquant_vllm.limits import check_block_mates, check_connector, check_engine, check_equal_pages, check_page
from turboquant_vllm.options import read_options
from turboquant_vllm.setup import engine_options, is_draft

TEXT = {
    "model_type": "llama",
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_size": 64,
    "vocab_size": 100,
}
KINDS = ["sliding_attention", "full_attention"]


def engine(turboquant: dict[str, Any], speculative: Any = None, **text: Any) -> Any:
    """The parts of vLLM's configuration that are read."""
    config = SimpleNamespace(**{**TEXT, **text})
    return SimpleNamespace(
        additional_config={"turboquant": turboquant},
        cache_config=SimpleNamespace(cache_dtype="auto"),
        model_config=SimpleNamespace(hf_config=config, hf_text_config=config),
        speculative_config=speculative,
    )


def check(turboquant: dict[str, Any], **text: Any) -> None:
    check_equal_pages(read_options({"turboquant": turboquant}, {}), engine(turboquant, **text))


@pytest.mark.parametrize(
    "turboquant",
    [
        {"layers": {"1": {"k_bits": 3}}},
        {"layers": {"-1": "uncompressed"}},
        {"boundary_layers": 1, "boundary": {"k_bits": 4, "v_bits": 3}},
    ],
)
def test_layers_that_share_blocks_must_be_equal(turboquant: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match="Give all layers equal bits"):
        check(turboquant, layer_types=2 * KINDS)
    check(turboquant)
    check(turboquant, layer_types=4 * ["full_attention"])


def test_equal_layers_and_layers_without_attention_share_blocks() -> None:
    check({"bits": 3}, layer_types=2 * KINDS)
    check({"layers": {"0": "uncompressed"}}, layer_types=["mamba", *(3 * ["full_attention"])])


def pages(name: str, head_dim: int, kv_heads: int = 2) -> Any:
    """The parts of a layer's setup that are read: 4 bits a coordinate and two scales."""
    return SimpleNamespace(
        name=name, token_bytes=head_dim + 4, shape=SimpleNamespace(head_dim=head_dim, kv_heads=kv_heads)
    )


def test_pages_that_are_no_multiple_of_one_another_cannot_share_blocks() -> None:
    mixed, alike = engine({}, layer_types=2 * KINDS), engine({}, layer_types=4 * ["full_attention"])
    local, whole = pages("layers.0", 256), pages("layers.5", 512)
    check_block_mates(whole, [local], alike)
    check_block_mates(whole, [], mixed)
    check_block_mates(pages("layers.5", 256, kv_heads=1), [local], mixed)
    with pytest.raises(UnsupportedError) as refused:
        check_block_mates(whole, [local], mixed)
    assert str(refused.value) == (
        "layers layers.0 (head_dim 256, 2 KV heads) and layers.5 (head_dim 512, 2 KV heads) have pages of which the "
        "larger is no multiple of the smaller; this model's layers are of several kinds (full_attention, "
        "sliding_attention), which share blocks: serve this model with another --attention-backend"
    )


def test_filled_up_pages_are_refused() -> None:
    check_page(SimpleNamespace(real_page_size_bytes=2176, page_size_padded=None))
    check_page(SimpleNamespace(real_page_size_bytes=2176, page_size_padded=2176))
    with pytest.raises(UnsupportedError, match="pages of 2176 bytes up to 4096"):
        check_page(SimpleNamespace(real_page_size_bytes=2176, page_size_padded=4096))


@pytest.fixture
def preset(tmp_path: Any) -> dict[str, Any]:
    path = tmp_path / "preset.json"
    save_preset(Preset(Fingerprint("llama", 4, 2, 16, 64, 100), (3, 4), layers={1: (4, 4)}), path)
    return {"preset": str(path)}


def test_a_preset_of_another_model_is_refused(preset: dict[str, Any]) -> None:
    assert engine_options(engine(preset)).default.k_bits == 3
    with pytest.raises(
        OptionError, match=r"turboquant\.preset: the preset is for a model with hidden_size 64, this one"
    ):
        engine_options(engine(preset, hidden_size=128))


def test_a_draft_model_gets_the_default_bits(preset: dict[str, Any]) -> None:
    target, draft = engine(preset), engine(preset, num_hidden_layers=1)
    speculative = SimpleNamespace(target_model_config=target.model_config, draft_model_config=draft.model_config)
    target.speculative_config = draft.speculative_config = speculative
    assert not is_draft(target)
    assert is_draft(draft)
    assert engine_options(target).layers
    assert not engine_options(draft).layers
    # Drafts by n-grams: vLLM names the model itself as its draft model.
    speculative.draft_model_config = target.model_config
    assert not is_draft(target)


@pytest.mark.parametrize(
    ("parallel", "cache", "message"),
    [
        ({"decode_context_parallel_size": 2}, {}, "decode_context_parallel_size is 2; packed pages work with 1"),
        ({"prefill_context_parallel_size": 4}, {}, "prefill_context_parallel_size is 4; packed pages work with 1"),
        ({"use_ubatching": True}, {}, r"\(--enable-dbo\) do not work over packed pages: drop it"),
        ({}, {"kv_sharing_fast_prefill": True}, "--kv-sharing-fast-prefill does not work over packed pages: drop it"),
    ],
)
def test_ways_to_run_a_step_are_refused_by_name(parallel: dict[str, Any], cache: dict[str, Any], message: str) -> None:
    config = engine({})
    config.parallel_config, config.cache_config = SimpleNamespace(), SimpleNamespace()
    check_engine(config)
    config.parallel_config, config.cache_config = SimpleNamespace(**parallel), SimpleNamespace(**cache)
    with pytest.raises(UnsupportedError, match=message):
        check_engine(config)


def connector(name: str | None, module: str | None = None, **extra: Any) -> Any:
    return SimpleNamespace(kv_connector=name, kv_connector_module_path=module, kv_connector_extra_config=extra)


def test_connectors_that_move_whole_blocks() -> None:
    check_connector(None)
    check_connector(connector(None))
    check_connector(connector("ExampleConnector", shared_storage_path="/nowhere"))
    check_connector(connector("OffloadingConnector", cpu_bytes_to_use=1))
    check_connector(connector("OffloadingConnector", spec_name="CPUOffloadingSpec"))


@pytest.mark.parametrize(
    ("transfer", "message"),
    [
        (connector("NixlConnector"), "KV connector 'NixlConnector' may take packed pages of other options"),
        (connector("MultiConnector"), "KV connector 'MultiConnector'"),
        (connector("OffloadingConnector", "my.module"), "or drop --kv-transfer-config"),
        (connector("OffloadingConnector", spec_name="TieringOffloadingSpec"), "drop spec_name from kv_connector_extra"),
    ],
)
def test_connectors_to_elsewhere_are_refused(transfer: Any, message: str) -> None:
    config = engine({})
    config.parallel_config, config.cache_config = SimpleNamespace(), SimpleNamespace()
    config.kv_transfer_config = transfer
    with pytest.raises(UnsupportedError, match=message):
        check_engine(config)
