"""Layers as affine maps: what each torch, torchvision or timm layer is in eval, or why it is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadConfig, NotMergeable
from .affine import NO_PADDING, Affine, Pair, Sides

_WHY = {
    **dict.fromkeys(
        ("AdaptiveAvgPool2d", "AdaptiveMaxPool2d", "FastAdaptiveAvgPool", "adaptive_avg_pool2d", "mean"),
        "pools the whole map, as squeeze-excitation does, so that each output pixel reads every input pixel",
    ),
    **dict.fromkeys(("MaxPool2d", "max_pool2d", "amax"), "takes a maximum"),
    **dict.fromkeys(
        ("LayerNorm", "LayerNorm2d", "GroupNorm", "GroupNorm1", "InstanceNorm2d", "layer_norm", "group_norm"),
        "normalises by statistics of its own input, in eval too",
    ),
    **dict.fromkeys(
        ("mul", "mul_", "imul", "matmul", "bmm", "softmax", "Softmax", "MultiheadAttention"),
        "weighs the map by a function of the map, as attention does",
    ),
    **dict.fromkeys(("size", "getattr"), "reads the map's size"),
    **dict.fromkeys(("interpolate", "Upsample", "PixelShuffle"), "resizes the map"),
    "Fade": "is an activation that is still fading: settle the network first",
    "ConvTranspose2d": "is a transposed convolution: neither its border nor its stride is a convolution's",
}


def why_not(name: str) -> str:
    """The end of the sentence '<layer or function> is not affine: it ...'; '' if nothing is known about it."""
    return _WHY.get(name, "")


def from_conv(conv: nn.Conv2d, padding: Sides) -> Affine:
    """A convolution as a map, its padding given as four sides (see `padding_of`)."""
    bias = None if conv.bias is None else value(conv.bias)
    return Affine(value(conv.weight), bias, conv.stride, conv.dilation, padding, conv.groups)


def from_batchnorm(bn: nn.BatchNorm2d) -> Affine:
    """A BatchNorm in eval as a per-channel scale and shift.

    scale = gamma / sqrt(running_var + eps), shift = beta - running_mean * scale.

    Raises:
        NotMergeable: if it keeps no running statistics; train it with `track_running_stats=True`.
    """
    if bn.running_mean is None or bn.running_var is None:
        raise NotMergeable("a BatchNorm without running statistics is not affine: track them in training")
    mean, var = value(bn.running_mean), value(bn.running_var)
    if not var.is_meta and bool((var + bn.eps <= 0).any()):
        raise NotMergeable("has a running variance that is not positive: its statistics are damaged")
    scale = (var + bn.eps).rsqrt()
    if bn.weight is not None:
        scale = scale * value(bn.weight)
    shift = -mean * scale
    if bn.bias is not None:
        shift = shift + value(bn.bias)
    return Affine(scale.reshape(-1, 1, 1, 1), shift, groups=scale.numel())


def from_avgpool(pool: nn.AvgPool2d, channels: int, padding: Sides, like: Tensor) -> Affine:
    """An average over a window as a depthwise convolution of equal weights.

    Raises:
        NotMergeable: if it leaves the padding out of its averages, which then differ at the border.
    """
    if padding != NO_PADDING and not pool.count_include_pad:
        raise NotMergeable("leaves the padding out of its averages, which then differ at the border")
    k_v, k_h = _pair(pool.kernel_size)
    weight = like.new_full((channels, 1, k_v, k_h), 1 / (pool.divisor_override or k_v * k_h))
    return Affine(weight, None, _pair(pool.stride), (1, 1), padding, channels)


def padding_of(layer: nn.Conv2d | nn.AvgPool2d, size: Pair | None = None) -> Sides:
    """The zeros that a convolution or average puts around its input, (left, right, top, bottom).

    Args:
        layer: any `Conv2d` or `AvgPool2d`, also with `padding='same'`, and timm's `Conv2dSame`.
        size: (H, W) of its input; needed only where padding depends on it (`depends_on_size`).
    Raises:
        NotMergeable: for a padding mode other than zeros, or a subclass with its own arithmetic.
        BadConfig: if the padding depends on the size and none is given.
    """
    sized = depends_on_size(layer)
    if sized and size is None:
        raise BadConfig(f"{type(layer).__name__} pads by its input's size: pass image_size")
    if isinstance(layer, nn.AvgPool2d):
        return _pool_padding(layer, size)
    if layer.padding_mode != "zeros":
        raise NotMergeable(f"padding mode {layer.padding_mode!r} is not affine at the border: only zeros are")
    if not sized and type(layer).forward is not nn.Conv2d.forward:
        raise NotMergeable(f"{type(layer).__name__} computes its own way, not as Conv2d")
    if not sized and isinstance(layer.padding, tuple):
        v, h = layer.padding
        return (h, h, v, v)
    if not sized and layer.padding == "valid":
        return NO_PADDING
    v, h = (d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
    if sized and size is not None:
        v, h = (max(-n % s - s + span + 1, 0) for n, s, span in zip(size, layer.stride, (v, h), strict=True))
    return (h // 2, h - h // 2, v // 2, v - v // 2)


def depends_on_size(layer: nn.Module) -> bool:
    """Whether a layer's padding depends on the size of its input."""
    from timm.layers import Conv2dSame

    return isinstance(layer, Conv2dSame) or (isinstance(layer, nn.AvgPool2d) and layer.ceil_mode)


def unpadded(layer: nn.Conv2d | nn.AvgPool2d) -> nn.Conv2d | nn.AvgPool2d:
    """The same layer without padding, sharing its weights."""
    if isinstance(layer, nn.AvgPool2d):
        return nn.AvgPool2d(layer.kernel_size, layer.stride, divisor_override=layer.divisor_override)
    (k_v, k_h), (s_v, s_h), (d_v, d_h) = layer.kernel_size, layer.stride, layer.dilation
    channels = layer.in_channels, layer.out_channels
    new = nn.Conv2d(*channels, (k_v, k_h), (s_v, s_h), 0, (d_v, d_h), layer.groups, bias=False, device="meta")
    new.weight, new.bias = layer.weight, layer.bias
    return new.train(layer.training)


def pad_sides(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sides:
    """The four sides in the arguments of `F.pad` after its first: (left, right, top, bottom).

    Raises:
        NotMergeable: unless it pads (or crops) with zeros, on four sides.
    """
    sides, *rest = (*args, *[kwargs[key] for key in ("pad", "mode", "value") if key in kwargs])
    if any(given not in ("constant", 0, None) for given in rest) or len(sides) != 4:
        raise NotMergeable("only zero padding on four sides is affine")
    return tuple(sides)


def free_layers() -> tuple[type[nn.Module], ...]:
    """Layers that do nothing in eval."""
    from timm.layers import DropBlock2d, DropPath
    from torchvision.ops import DropBlock2d as TorchvisionDropBlock2d
    from torchvision.ops import StochasticDepth

    drops = (nn.Dropout, nn.Dropout2d, nn.AlphaDropout, StochasticDepth, DropPath, DropBlock2d, TorchvisionDropBlock2d)
    return (nn.Identity, *drops)


def value(tensor: Tensor) -> Tensor:
    """A weight in float64 for the algebra, which runs on the CPU (not every device has float64) or on `meta`.

    Raises:
        NotMergeable: if the weights are quantised.
    """
    if not tensor.is_floating_point():
        raise NotMergeable(f"has weights of {tensor.dtype}: merge the float network, then quantise")
    return tensor.detach().to("meta" if tensor.is_meta else "cpu", torch.float64)


def _pool_padding(pool: nn.AvgPool2d, size: Pair | None) -> Sides:
    if type(pool).forward is not nn.AvgPool2d.forward:
        raise NotMergeable(f"{type(pool).__name__} computes its own way, not as AvgPool2d")
    v, h = _pair(pool.padding)
    if not pool.ceil_mode or size is None:
        return (h, h, v, v)
    if (v, h) != (0, 0) and not pool.count_include_pad:
        raise NotMergeable("leaves the padding out of its averages, which then differ at the border")
    more = []
    for n, k, s, p in zip(size, _pair(pool.kernel_size), _pair(pool.stride), (v, h), strict=True):
        if (n + 2 * p - k) % s:
            raise NotMergeable(f"averages fewer pixels in the last window of a {size[0]} x {size[1]} map (ceil_mode)")
        # zeros that no window reaches, so that a padded convolution beside it gives maps of the same size
        more.append(max(min(k - 1 - 2 * p, s - 1), 0))
    return (h, h + more[1], v, v + more[0])


def _pair(size: int | Sequence[int]) -> Pair:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
