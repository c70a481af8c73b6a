"""The golden file fixes layout version 1: it may not change, and it must agree with its generator."""

from __future__ import annotations

import hashlib
import json

import pytest

from turboquant_core import LAYOUT_VERSION, Codec, ReferenceProvider, VectorLayout, format_codebook, rotation_signs
from turboquant_core.testing import golden_cases
from turboquant_core.testing.golden import GOLDEN_HEAD_DIMS, golden_text
from turboquant_core.testing.golden.generate import document

DIGESTS = {1: "6aa3ed483d4f1e2b795a12bfd03a14ae13a4a8dd96094f3a3b307ec7548949bc"}
"""SHA-256 of the golden file of every published layout version. Never edit an entry: add a version."""


def test_every_version_has_its_digest() -> None:
    assert sorted(DIGESTS) == list(range(1, LAYOUT_VERSION + 1))
    for version, digest in DIGESTS.items():
        assert hashlib.sha256(golden_text(version).encode()).hexdigest() == digest


def test_generator_reproduces_the_file() -> None:
    assert document() == golden_text()


def test_every_head_dim_and_codec_is_present() -> None:
    expected = {(d, bits, form) for d in GOLDEN_HEAD_DIMS for bits in (2, 3, 4) for form in ("int8", "cubic")}
    assert set(golden_cases()) == expected


def test_signs_and_levels_are_those_of_the_codec() -> None:
    document_ = json.loads(golden_text())
    for entry in document_["levels"]:
        assert list(format_codebook(entry["form"], entry["bits"]).levels) == entry["levels"]
    for entry in document_["cases"]:
        signs = rotation_signs(entry["head_dim"], seed=entry["seed"], stream=entry["stream"])
        assert entry["signs"] == "".join("+" if sign > 0 else "-" for sign in signs.tolist())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_golden_vectors_decode_to_what_they_were(bits: int) -> None:
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
        assert error / energy == pytest.approx(format_codebook(form, bits).mse, rel=0.2)
