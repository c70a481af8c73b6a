"""The few tokens that a model is checked with: a left-padded prompt, single tokens, several over a past."""

from __future__ import annotations

import torch
from torch import Tensor

from turboquant_core import TurboQuantError

from .compat import Cache, PreTrainedModel
from .decoder_call import decoder_call

PROMPT_TOKENS = 24
DECODE_STEPS = 4
CHUNK_TOKENS = 3
WIDTHS = (PROMPT_TOKENS, *[1] * DECODE_STEPS, CHUNK_TOKENS)
ALL_TOKENS = sum(WIDTHS)
PADDING = 5
SEQUENCES = 2


def _steps(vocabulary: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """(ids, mask so far) of a left-padded prompt, single tokens, and one step of several tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (SEQUENCES, ALL_TOKENS), generator=generator).to(device)
    mask = torch.ones_like(ids)
    mask[1, :PADDING] = 0
    stops = torch.tensor(WIDTHS).cumsum(0).tolist()
    return [(ids[:, stop - width : stop], mask[:, :stop]) for width, stop in zip(WIDTHS, stops, strict=True)]


@torch.no_grad()
def run_steps(model: PreTrainedModel, cache: Cache) -> Tensor:
    """Run a left-padded prompt, single tokens and a step of several over ``cache``; of an encoder-decoder, the decoder.

    Returns:
        Logits float32 ``[2, tokens after the prompt, vocabulary]``.

    Raises:
        TurboQuantError: the model fails.
    """
    # Weights that are offloaded have no place; what brings them back takes its inputs along.
    device = torch.device("cpu") if model.device.type == "meta" else model.device
    training = model.training
    model.eval()
    rows = []
    try:
        call = decoder_call(model, cache, SEQUENCES, device)
        for ids, mask in _steps(model.config.get_text_config(decoder=True).vocab_size, device):
            rows.append(call(ids, mask).logits)
    except (TurboQuantError, ValueError):
        raise
    # Whatever a model's own code raises.
    except Exception as error:
        raise _does_not_run(model, cache, error) from error
    finally:
        model.train(training)
    return torch.cat(rows[1:], dim=1).float()


def _does_not_run(model: PreTrainedModel, cache: Cache, error: Exception) -> TurboQuantError:
    # A model may take the room that keys have for their number.
    where, way_out = (
        (f"a left-padded batch, single tokens and {CHUNK_TOKENS} at once", "patch_model(verify=False) skips this check")
        if getattr(cache, "room", None) is None
        else ("over a cache of fixed room", "leave max_cache_len out for one that grows")
    )
    what = ": ".join((type(error).__name__, *str(error).strip().splitlines()[:1]))
    return TurboQuantError(f"{type(model).__name__} does not run {where} ({what}): {way_out}")
