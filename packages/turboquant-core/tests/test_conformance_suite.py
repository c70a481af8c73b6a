"""The conformance suite catches what it is for: dropped tests, and providers wrong in one respect each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from turboquant_core import Attended, CacheCodec, Codec, Gathered, Packed, ReferenceProvider
from turboquant_core.testing import ProviderConformance


class DropsATest(ProviderConformance):
    test_attend_sinks = None


class ReplacesATest(ProviderConformance):
    def test_attend_sinks(self) -> None:  # type: ignore[override]
        return


class ExplainsATest(ProviderConformance):
    @pytest.mark.xfail(reason="sinks are not implemented")
    def test_attend_sinks(self) -> None:  # type: ignore[override]
        raise NotImplementedError


@pytest.mark.parametrize("suite", [DropsATest, ReplacesATest])
def test_dropped_tests_are_noticed(suite: type[ProviderConformance]) -> None:
    with pytest.raises(AssertionError, match="test_attend_sinks"):
        suite().test_suite_is_intact()


def test_an_explained_xfail_is_accepted() -> None:
    ExplainsATest().test_suite_is_intact()


def test_must_run_fails_instead_of_skipping() -> None:
    class Refuses(ReferenceProvider):
        def unsupported_reason(self, request: Any) -> str | None:
            return "not today"

    class Suite(ProviderConformance):
        must_run = True

    with pytest.raises(pytest.fail.Exception, match="not today"):
        Suite().test_attend_sinks(Refuses())
    with pytest.raises(pytest.skip.Exception, match="not today"):
        ProviderConformance().test_attend_sinks(Refuses())


def test_a_provider_of_other_bits_is_tested_in_full() -> None:
    """Tests whose subject is not the bits take the first that the class names, and property tests draw from them."""

    class ThreeBits(ReferenceProvider):
        def unsupported_reason(self, request: Any) -> str | None:
            bits = (request.layout.key.bits, request.layout.value.bits)
            return None if bits == (3, 3) else f"bits are {bits}"

    class Suite(ProviderConformance):
        bits = ((3, 3),)
        must_run = True

    for name in ("attend_sinks", "attend_ragged_queries", "attend_any_lengths", "center_is_removed_and_restored"):
        getattr(Suite(), f"test_{name}")(ThreeBits())
    Suite().test_attend_options(ThreeBits(), {"window": 20})
    Suite().test_scores_equal_float64(ThreeBits(), 64)
    Suite().test_golden_bytes(ThreeBits(), 64, 3, "cubic")


def test_bits_that_the_class_does_not_name_are_not_promised() -> None:
    class FourBitKeys(ReferenceProvider):
        def unsupported_reason(self, request: Any) -> str | None:
            return None if request.layout.key.bits == 4 else "keys of other widths"

    class NoValuesOfThreeBits(ReferenceProvider):
        def unsupported_reason(self, request: Any) -> str | None:
            return "no values of 3 bits" if request.layout.value.bits == 3 else None

    class Suite(ProviderConformance):
        bits = ((4, 4), (4, 3))
        must_run = True

    Suite().test_golden_bytes(FourBitKeys(), 64, 4, "int8")
    Suite().test_golden_bytes(FourBitKeys(), 64, 3, "cubic")
    for bits in (2, 3):
        with pytest.raises(pytest.skip.Exception, match="other widths"):
            Suite().test_golden_bytes(FourBitKeys(), 64, bits, "int8")
    with pytest.raises(pytest.fail.Exception, match="no values of 3 bits"):
        Suite().test_golden_bytes(NoValuesOfThreeBits(), 64, 3, "cubic")
    with pytest.raises(pytest.skip.Exception, match="no values of 3 bits"):
        Suite().test_attend_several_queries_causal(NoValuesOfThreeBits(), (2, 3))
    assert Suite().named_bits(mixed=False) == [(4, 3), (4, 4)]
    with pytest.raises(pytest.skip.Exception, match="fractional bits are not named"):
        Suite().named_bits(mixed=True)


class IgnoresWindow(ReferenceProvider):
    def attend(self, *args: Any, window: int | None = None, **kwargs: Any) -> Attended:
        return super().attend(*args, **kwargs)


class IgnoresSoftcap(ReferenceProvider):
    def attend(self, *args: Any, softcap: float | None = None, **kwargs: Any) -> Attended:
        return super().attend(*args, **kwargs)


class IgnoresPadding(ReferenceProvider):
    def attend(self, *args: Any, seq_starts: Tensor | None = None, **kwargs: Any) -> Attended:
        return super().attend(*args, **kwargs)


class IgnoresSinks(ReferenceProvider):
    def attend(self, *args: Any, sinks: Tensor | None = None, **kwargs: Any) -> Attended:
        return super().attend(*args, **kwargs)


@pytest.mark.parametrize(
    ("provider", "options"),
    [
        (IgnoresWindow(), {"window": 20}),
        (IgnoresSoftcap(), {"softcap": 3.0}),
        (IgnoresPadding(), {"seq_starts": [0, 7, 30]}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_ignored_option_is_caught(provider: ReferenceProvider, options: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        ProviderConformance().test_attend_options(provider, options)


def test_ignored_sinks_are_caught() -> None:
    with pytest.raises(AssertionError):
        ProviderConformance().test_attend_sinks(IgnoresSinks())


class WritesSkippedSlots(ReferenceProvider):
    def store(self, key: Tensor, value: Tensor, pages: Tensor, slot_mapping: Tensor, codec: CacheCodec) -> None:
        super().store(key, value, pages, slot_mapping.clamp(min=0), codec)


class OneCodeWrong(ReferenceProvider):
    def encode(self, x: Tensor, codec: Codec) -> Packed:
        packed = super().encode(x, codec)
        packed.codes[..., 0] ^= 1
        return packed


class ReadsUnwrittenValues(ReferenceProvider):
    def gather(self, *args: Any, **kwargs: Any) -> Gathered:
        keys, values = super().gather(*args, **kwargs)
        return Gathered(keys, torch.zeros_like(values))


def test_wrong_bytes_are_caught() -> None:
    suite = ProviderConformance()
    with pytest.raises(AssertionError):
        suite.test_store_writes_its_slots_and_no_other_byte(WritesSkippedSlots(), (4, 4), 16)
    with pytest.raises(AssertionError):
        suite.test_golden_bytes(OneCodeWrong(), 64, 4, "cubic")
    with pytest.raises(AssertionError):
        suite.test_encode_equals_the_reference(OneCodeWrong(), 64, (2.5, 4), "norm")
    with pytest.raises(AssertionError):
        suite.test_gather_equals_float64(ReadsUnwrittenValues(), 64, (4, 4))
