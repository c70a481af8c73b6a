"""Shared memory of GPU generations."""

from __future__ import annotations

SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes that a program can have, by capability."""
