"""float32 that is float32: products with J on GPUs that would round their factors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Has CUDA multiply float32 by all its 24 bits within the block; by default it convolves by 11 of them (TF32).

    What floating point knows of G (`Spectrum.resolution`) is judged by the type. The flags are the process's: what
    other threads compute meanwhile is as exact. Where a program has set them by operator (`fp32_precision`), they are
    its own affair and left alone.

    Args:
        device: Where the block computes; on others than CUDA nothing is done.
    """
    kept: list[tuple[Any, bool]] = []
    places: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul) if device.type == "cuda" else ()
    for flags in places:
        try:
            kept.append((flags, flags.allow_tf32))
        except RuntimeError:  # set by operator
            continue
        flags.allow_tf32 = False
    try:
        yield
    finally:
        for flags, allowed in kept:
            flags.allow_tf32 = allowed
