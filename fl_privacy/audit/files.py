"""Models, batches and gradients from files: PyTorch's `.pt`, read without running code, and NumPy's `.npz`."""

from __future__ import annotations

import pickle
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fl_privacy.audit.task import Array
from fl_privacy.errors import InvalidInputError


def load_arrays(path: Path) -> dict[str, Array]:
    """Returns the arrays of a file by name; a list of them is named `"0"`, `"1"` and so on.

    Args:
        path: A `.pt` or `.pth` file with a tensor, or a list or mapping of tensors, loaded with `weights_only=True`, or
            an `.npz` file, loaded without pickle.

    Raises:
        InvalidInputError: The file has another ending, cannot be read, or holds something else.
    """
    if not path.is_file():
        raise InvalidInputError(f"expected a file at {path}, and there is none")
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as archive:
                loaded: Any = {name: archive[name] for name in archive.files}
        except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise InvalidInputError(f"{path} cannot be read as .npz: {error}") from error
        if loaded and all(name.startswith("arr_") for name in loaded):  # np.savez(path, *arrays)
            loaded = [loaded[f"arr_{index}"] for index in range(len(loaded))]
    elif path.suffix in (".pt", ".pth"):
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InvalidInputError(
                f"{path} cannot be read as tensors ({reason}): save a tensor, or a list or dict of tensors"
            ) from error
    else:
        raise InvalidInputError(f"expected a .pt, .pth or .npz file, got {path.name}")
    if isinstance(loaded, Tensor | np.ndarray):
        loaded = [loaded]
    if isinstance(loaded, Sequence):
        loaded = {str(index): value for index, value in enumerate(loaded)}
    if not isinstance(loaded, Mapping):
        raise InvalidInputError(
            f"expected {path} to hold tensors, or a list or dict of them, got {type(loaded).__name__}"
        )
    return {str(name): _array(path, str(name), value) for name, value in loaded.items()}


def load_batch(path: Path) -> tuple[Array, Array]:
    """Returns inputs `[N, *shape]` and labels `[N, ...]` from a file with `inputs` and `labels`, or a pair of arrays.

    Raises:
        InvalidInputError: The file holds something else.
    """
    arrays = load_arrays(path)
    for inputs, labels in (("inputs", "labels"), ("x", "y"), ("0", "1")):
        if arrays.keys() == {inputs, labels}:
            return arrays[inputs], arrays[labels]
    raise InvalidInputError(f"expected {path} to hold inputs and labels, got {', '.join(arrays) or 'nothing'}")


def load_update(path: Path, model: nn.Module) -> dict[str, Array]:
    """Returns a gradient or update by parameter name; a list is taken to be in the order of `named_parameters()`.

    Raises:
        InvalidInputError: Its names or shapes are not those of the model's parameters.
    """
    arrays = load_arrays(path)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if arrays.keys() == {str(index) for index in range(len(shapes))} != shapes.keys():
        arrays = dict(zip(shapes, arrays.values(), strict=True))
    missing = [name for name in shapes if name not in arrays]
    if missing:
        raise InvalidInputError(
            f"expected {path} to hold one array for each parameter of the model, got {', '.join(list(arrays)[:5])}; "
            f"{', '.join(missing[:5])} missing"
        )
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise InvalidInputError(
                f"expected {name} in {path} to have the parameter's shape {list(shape)}, got {list(arrays[name].shape)}"
            )
    return {name: arrays[name] for name in shapes}


def load_weights(path: Path, model: nn.Module) -> None:
    """Puts a saved state dict into the model.

    Raises:
        InvalidInputError: It is not this model's.
    """
    state = {name: torch.from_numpy(array) for name, array in load_arrays(path).items()}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise InvalidInputError(f"{path} does not hold the weights of this model: {reason}") from error


def _array(path: Path, name: str, value: object) -> Array:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiub":
        raise InvalidInputError(f"expected {name} in {path} to be an array of numbers, got {type(value).__name__}")
    return value
