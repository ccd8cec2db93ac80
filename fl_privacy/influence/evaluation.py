"""How a model is run inside an audit: without changing it, and with operators that can be differentiated twice."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

BatchNormMode = Literal["eval", "train"]


def has_batch_norm(model: nn.Module) -> bool:
    """Whether examples of a batch meet in batch normalisation while the model is trained."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


@contextlib.contextmanager
def audit_mode(model: nn.Module, *, batch_norm: BatchNormMode = "eval") -> Iterator[None]:
    """Runs a model in evaluation mode with operators that have second derivatives; restores every switch after.

    Dropout is off. Batch normalisation uses its running statistics (`eval`) or those of the batch (`train`), and never
    updates them. Scaled-dot-product attention uses its mathematical form, the fused kernels having no second
    derivative; recurrent layers leave cuDNN and oneDNN for the same reason.
    """
    modules = list(model.modules())
    training = [(m, m.training) for m in modules]
    tracked: list[tuple[_BatchNorm, Tensor | None, Tensor | None, bool]] = []
    recurrent = any(isinstance(m, nn.RNNBase) for m in modules)
    fastpath = torch.backends.mha.get_fastpath_enabled()
    with contextlib.ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, fastpath)
        stack.callback(_restore, training, tracked)
        for module in modules:
            module.training = False
            if batch_norm == "train" and isinstance(module, _BatchNorm):
                # Without running statistics, batch normalisation takes those of the batch and writes none.
                tracked.append((module, module.running_mean, module.running_var, module.track_running_stats))
                module.running_mean = module.running_var = None
                module.track_running_stats = False
        torch.backends.mha.set_fastpath_enabled(False)
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if recurrent:
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            stack.enter_context(_without_onednn())
        yield


@contextlib.contextmanager
def _without_onednn() -> Iterator[None]:
    # mkldnn.flags() would write its precision switches back as well, and warn where a build lacks them.
    enabled = bool(torch.backends.mkldnn.enabled)
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = enabled  # type: ignore[assignment]


def _restore(
    training: Sequence[tuple[nn.Module, bool]],
    tracked: Sequence[tuple[_BatchNorm, Tensor | None, Tensor | None, bool]],
) -> None:
    for module, flag in training:
        module.training = flag
    for norm, mean, variance, track in tracked:
        norm.running_mean, norm.running_var, norm.track_running_stats = mean, variance, track


@contextlib.contextmanager
def replaced_output(model: nn.Module, module_name: str, output: Tensor) -> Iterator[None]:
    """Makes one submodule return `output`, whatever it is given: the way to feed a model at an inner layer."""
    handle = model.get_submodule(module_name).register_forward_hook(lambda _module, _args, _output: output)
    try:
        yield
    finally:
        handle.remove()


class RoundedReLUs(TorchFunctionMode):
    """Rounds off the kinks of ReLUs, leaky ones, ReLU6 and hard tanh, as modules or as functions, in a forward pass.

    Max pooling and absolute values keep theirs.

    Args:
        width: Relative to the root mean square of what a layer sees of an example.
    """

    def __init__(self, width: float) -> None:
        super().__init__()
        self._width = width

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Intercepts functions with kinks on tensors of numbers; every other function runs unchanged."""
        kwargs = kwargs or {}
        smooth = _SMOOTH.get(func)
        if smooth is None:
            return func(*args, **kwargs)
        z, *rest = args or (kwargs["input"],)
        if not z.is_floating_point():
            return func(*args, **kwargs)
        options = {name: value for name, value in kwargs.items() if name != "input"}
        inplace = options.pop("inplace", False) or func in _INPLACE
        if func in _LAST_IS_INPLACE and len(rest) == _LAST_IS_INPLACE[func]:
            *rest, inplace = rest
        if not inplace:
            return smooth(z, self._of(z), *rest, **options)
        return z.copy_(smooth(z.clone(), self._of(z), *rest, **options))  # the copy is what the backward pass needs

    def _of(self, z: Tensor) -> Tensor:
        """The width for each example `[N, 1, ...]`, of which none may depend on the others."""
        squares = z.detach().square()
        scale = (squares.mean(tuple(range(1, z.ndim)), keepdim=True) if z.ndim > 1 else squares).sqrt()
        return self._width * torch.where(scale > 0, scale, 1.0)  # of zeros alone no scale is known


def rounded_relu(z: Tensor, width: float | Tensor) -> Tensor:
    """Returns z·Φ(z/w), with Φ the distribution function of a standard normal variable: GELU, w times as wide."""
    return 0.5 * z * (1 + torch.erf(z / (math.sqrt(2) * width)))


def _leaky_relu(z: Tensor, width: Tensor, negative_slope: float = 0.01) -> Tensor:
    return negative_slope * z + (1 - negative_slope) * rounded_relu(z, width)


def _hardtanh(z: Tensor, width: Tensor, min_val: float = -1.0, max_val: float = 1.0) -> Tensor:
    return min_val + rounded_relu(z - min_val, width) - rounded_relu(z - max_val, width)


def _relu6(z: Tensor, width: Tensor) -> Tensor:
    return _hardtanh(z, width, 0.0, 6.0)


_SMOOTH: dict[Callable[..., Any], Callable[..., Tensor]] = {
    **dict.fromkeys((F.relu, torch.relu, torch.Tensor.relu, torch.relu_, torch.Tensor.relu_), rounded_relu),
    F.leaky_relu: _leaky_relu,
    F.relu6: _relu6,
    F.hardtanh: _hardtanh,
}
"""What runs in place of a function, given a width after its first argument."""
_INPLACE = (torch.relu_, torch.Tensor.relu_)
_LAST_IS_INPLACE = {F.relu: 1, F.leaky_relu: 2, F.relu6: 1, F.hardtanh: 3}
"""With how many arguments after the first, given by place, the last of them is `inplace`."""
