"""How a model is run inside an audit: without changing it, and with operators that can be differentiated twice."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

BatchNormMode = Literal["eval", "train"]


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


class LaneConvolution(TorchFunctionMode):
    """Runs 2-D convolutions as patch extraction and a matrix product.

    A convolution whose weights differ from lane to lane becomes a grouped convolution under `vmap`, which is several
    times slower than the batched matrix product that this form becomes. Grouped convolutions and padding given by name
    are left as they are.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Intercepts `conv2d`; every other function runs unchanged."""
        kwargs = kwargs or {}
        if func is torch.conv2d or func is F.conv2d:
            return _convolve(func, *args, **kwargs)
        return func(*args, **kwargs)


def _convolve(
    conv2d: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    if groups != 1 or isinstance(padding, str) or input.ndim != 4:
        return conv2d(input, weight, bias, stride, padding, dilation, groups)
    (sh, sw), (ph, pw), (dh, dw) = _pair(stride), _pair(padding), _pair(dilation)
    out_channels, _, kh, kw = weight.shape
    height = (input.shape[2] + 2 * ph - dh * (kh - 1) - 1) // sh + 1
    width = (input.shape[3] + 2 * pw - dw * (kw - 1) - 1) // sw + 1
    patches = F.unfold(input, (kh, kw), dilation=(dh, dw), padding=(ph, pw), stride=(sh, sw))
    output = (weight.reshape(out_channels, -1) @ patches).reshape(input.shape[0], out_channels, height, width)
    return output if bias is None else output + bias[:, None, None]


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    items = tuple(value)
    return (items[0], items[0]) if len(items) == 1 else (items[0], items[1])
