"""The operations in plain PyTorch: they define what is right, on any device, at any speed."""

from __future__ import annotations

from .provider import ReferenceProvider

__all__ = ["ReferenceProvider"]
