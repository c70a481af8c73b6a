"""What the functions of this package ask of their arguments, said in one way."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from functools import wraps
from inspect import Parameter, signature
from typing import Any, ParamSpec, cast

from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedConfig

from .compat import PreTrainedModel

P = ParamSpec("P")


def check_model(model: object) -> PreTrainedModel:
    """The Transformers model that ``model`` is or, where it is a wrapper (adapters, ``torch.compile``), has in it.

    Raises:
        ValueError: it is no loaded model.
    """
    if isinstance(model, Module) and isinstance(getattr(model, "config", None), PreTrainedConfig):
        # What generates is the model within, whose methods a wrapper merely passes on.
        within = (module for module in model.modules() if isinstance(module, PreTrainedModel))
        return next(within, cast("PreTrainedModel", model))
    if isinstance(model, PreTrainedConfig):
        raise ValueError(f"model is a {type(model).__name__}: pass the model that has this configuration")
    if isinstance(model, Module):
        raise ValueError(
            f"model is a {type(model).__name__} without a Transformers configuration: pass the model in it"
        )
    raise ValueError(
        f"model is {_shown(model)}: pass a loaded Transformers model, such as "
        "AutoModelForCausalLM.from_pretrained(folder) gives"
    )


def check_config(config: object) -> None:
    """Raise ``ValueError`` for what is no configuration of a Transformers model."""
    if isinstance(config, PreTrainedConfig):
        return
    way_out = "model.config" if isinstance(config, Module) else "the config of a loaded Transformers model"
    raise ValueError(f"config is {_shown(config)}: pass {way_out}")


def check_ids(name: str, ids: object) -> None:
    """Raise ``ValueError`` for what are no token ids ``[batch, tokens]``."""
    if not isinstance(ids, Tensor):
        raise ValueError(
            f"{name} is {_shown(ids)}: pass token ids, such as tokenizer(text, return_tensors='pt').input_ids"
        )
    if ids.dim() != 2 or ids.is_floating_point():
        raise ValueError(f"{name} is {ids.dtype} {tuple(ids.shape)}: pass token ids, integers [batch, tokens]")


def _shown(value: object) -> str:
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return f"the string {value!r}" if isinstance(value, str) else f"a {type(value).__name__}"


def check_names(owner: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise ``TypeError``, as Python does, for a name of ``given`` that ``known`` lacks; names the closest and all."""
    known = list(known)
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise TypeError(f"{owner} has no option {name!r}: {hint}its options are {', '.join(known)}")


def option_names(function: Callable[..., Any]) -> list[str]:
    """Names by which ``function`` takes its arguments, the first (``self`` of a method) and ``config`` left out."""
    parameters = list(signature(function).parameters.values())[1:]
    named = (Parameter.KEYWORD_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    return [parameter.name for parameter in parameters if parameter.kind in named and parameter.name != "config"]


def checks_config_and_names(init: Callable[P, None]) -> Callable[P, None]:
    """An ``__init__(self, config, ...)`` of a cache with :func:`check_config` and :func:`check_names` before it."""
    known = option_names(init)

    @wraps(init)
    def checked(*args: P.args, **kwargs: P.kwargs) -> None:
        check_names(type(args[0]).__name__, (name for name in kwargs if name != "config"), known)
        config = kwargs["config"] if "config" in kwargs else args[1] if len(args) > 1 else None
        check_config(config)
        init(*args, **kwargs)

    return checked
