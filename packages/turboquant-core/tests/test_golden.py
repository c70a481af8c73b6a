"""The golden file fixes layout version 1: it may not change, and it must agree with its generator."""

from __future__ import annotations

import hashlib
import json
from itertools import product

import pytest
import torch

from turboquant_core import (
    LAYOUT_VERSION,
    Codec,
    ReferenceProvider,
    VectorLayout,
    format_codebook,
    rotation_signs,
    unpack_codes,
)
from turboquant_core.layout import BITS, FORMS
from turboquant_core.testing import golden_cases
from turboquant_core.testing.golden import GOLDEN_HEAD_DIMS, golden_text
from turboquant_core.testing.golden.generate import document, mixed_document

DIGESTS = {1: "6aa3ed483d4f1e2b795a12bfd03a14ae13a4a8dd96094f3a3b307ec7548949bc"}
"""SHA-256 of the golden file of every published layout version. Never edit an entry: add a version."""


MIXED_DIGESTS = {1: "e171fef58a5aa0e968fae0e4f1c4b32a1a11fe3de5b1c8d720309ee8cbb16368"}
"""The same of the files for 2.5 and 3.5 bits."""


def test_every_version_has_its_digest() -> None:
    assert sorted(DIGESTS) == list(range(1, LAYOUT_VERSION + 1))
    for version, digest in DIGESTS.items():
        assert hashlib.sha256(golden_text(version).encode()).hexdigest() == digest
        mixed = golden_text(version, mixed=True)
        assert hashlib.sha256(mixed.encode()).hexdigest() == MIXED_DIGESTS[version]


def test_generator_reproduces_the_file() -> None:
    assert document() == golden_text()
    assert mixed_document() == golden_text(mixed=True)


def test_every_head_dim_and_codec_is_present() -> None:
    expected = {(d, bits, form) for d in GOLDEN_HEAD_DIMS for bits in BITS for form in ("int8", "cubic")}
    assert set(golden_cases()) == expected


def test_signs_and_levels_are_those_of_the_codec() -> None:
    document_ = json.loads(golden_text())
    for entry in document_["levels"]:
        assert list(format_codebook(entry["form"], entry["bits"]).levels) == entry["levels"]
    for entry in document_["cases"]:
        signs = rotation_signs(entry["head_dim"], seed=entry["seed"], stream=entry["stream"])
        assert entry["signs"] == "".join("+" if sign > 0 else "-" for sign in signs.tolist())


def test_mixed_rows_are_the_halves_of_rows_of_one_width() -> None:
    """The first half has the codes of the wider layout, the second those of the narrower one."""
    cases = golden_cases()
    for head_dim in GOLDEN_HEAD_DIMS:
        for bits, form in product((2.5, 3.5), FORMS):
            layout, half = VectorLayout(head_dim, bits, form), head_dim // 2
            codes = unpack_codes(cases[head_dim, bits, form].codes, layout)
            for part, columns in zip(layout.parts, (slice(0, half), slice(half, None)), strict=True):
                whole = VectorLayout(head_dim, part.bits, form)
                expected = unpack_codes(cases[head_dim, part.bits, form].codes, whole)
                assert torch.equal(codes[:, columns], expected[:, columns])


@pytest.mark.parametrize("bits", BITS)
def test_golden_vectors_decode_to_what_they_were(bits: float) -> None:
    """The bytes mean the vectors: relative squared error near the codebook's, for each head_dim together."""
    for form in ("int8", "cubic"):
        error = energy = 0.0
        for head_dim in GOLDEN_HEAD_DIMS:
            case = golden_cases()[head_dim, bits, form]
            codec = Codec.create(VectorLayout(head_dim, bits, form), seed=case.seed, stream=case.stream)
            packed = ReferenceProvider().encode(case.vectors, codec)
            assert packed.codes.equal(case.codes)
            difference = ReferenceProvider().decode(packed, codec) - case.vectors
            error += float(difference.square().sum())
            energy += float(case.vectors.square().sum())
        expected = [format_codebook(form, part.width).mse for part in VectorLayout(64, bits, form).parts]
        assert error / energy == pytest.approx(sum(expected) / len(expected), rel=0.2)
