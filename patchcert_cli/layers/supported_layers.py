"""Which layers the interval proofs take, and the network that is deployed: rebuilt from their plain numbers.

A proof is about a formula; a layer is code. The two are the same only if the code has not been altered. So a layer is taken only
if

* it is of exactly one of the types of :data:`KNOWN`: a subclass, which parametrized layers are too, may compute something else;
* no attribute of the object replaces a method of its class, and it has no hooks (backward hooks do not alter what is computed);
* its options are plain whole numbers in the range in which the formula holds, and its weights are plain tensors;
* torch's own functions and methods for it are those that were there when this module was imported; no hooks are global.

Everything else is refused. What is taken is rebuilt: new layers of the same types, in eval mode, nothing in place, from these
numbers alone (:func:`rebuilt`). The rebuilt network is deployed, and it is the one that the proofs are about.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as modules

from patchcert_cli.errors import UnsupportedThreat
from patchcert_cli.layers.preprocessing import Normalize

IDENTITY = (nn.Identity, nn.Dropout, nn.Dropout2d)  # in eval mode
MONOTONE = (nn.ReLU, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Flatten)
CHANNEL_AFFINE = (Normalize, nn.BatchNorm1d, nn.BatchNorm2d)
KNOWN: tuple[type[nn.Module], ...] = (*IDENTITY, *MONOTONE, *CHANNEL_AFFINE, nn.Linear, nn.Conv2d)
OF_MAPS = (Normalize, nn.BatchNorm2d, nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)  # [B, C, H, W] only

ALLOWED = "Sequential, Linear, Conv2d, ReLU, Flatten, pooling, frozen batch norm, Normalize"
INSTEAD = {
    **dict.fromkeys(("ELU", "GELU", "Hardswish", "LeakyReLU", "Mish", "ReLU6", "SELU", "SiLU", "Sigmoid", "Tanh"), "ReLU"),
    **dict.fromkeys(("GroupNorm", "InstanceNorm2d", "LayerNorm", "LocalResponseNorm", "RMSNorm"), "batch norm"),
    "AdaptiveMaxPool2d": "MaxPool2d",
}

_METHODS = ("forward", "_conv_forward", "_check_input_dim", "_call_impl", "_wrapped_call_impl", "__call__", "__getattr__", "eval")
_FUNCTIONS = ("adaptive_avg_pool2d", "avg_pool2d", "batch_norm", "conv2d", "dropout", "dropout2d", "linear", "max_pool2d", "relu")


def _code() -> dict[tuple[str, str], Any]:
    """The code that runs when a layer is called, by owner and name."""
    owners: list[Any] = [nn.Module, nn.Sequential, *KNOWN]
    methods = {(owner.__name__, name): getattr(owner, name, None) for owner in owners for name in _METHODS}
    return {**methods, **{("torch.nn.functional", name): getattr(F, name) for name in _FUNCTIONS}}


_ORIGINAL = _code()


def layers_of(network: nn.Module) -> list[nn.Module]:
    """The layers of a (possibly nested) ``Sequential`` in order; a ReLU that works in place is replaced by one that does not.

    Raises:
        UnsupportedThreat: a layer is none of those that the module's text describes.
    """
    _check_process()
    layers = _flat(network)
    axes = 4  # of images [B, C, H, W]
    for layer in layers:
        if isinstance(layer, OF_MAPS) and axes != 4:
            raise _refused(layer, "it comes after a Flatten and would take images for channels", "put it before Flatten")
        if isinstance(layer, nn.Flatten):
            end = layer.end_dim if layer.end_dim >= 0 else axes + layer.end_dim
            axes -= max(0, min(end, axes - 1) - layer.start_dim)
    return [nn.ReLU() if isinstance(layer, nn.ReLU) and layer.inplace else layer for layer in layers]


def _flat(network: nn.Module) -> list[nn.Module]:
    _check(network)
    if isinstance(network, nn.Sequential):
        return [layer for child in network._modules.values() for layer in _flat(child)]
    return [network]


def rebuilt(network: nn.Module, dtype: torch.dtype | None = None) -> nn.Sequential:
    """The network that is deployed: the same layers, made from their plain numbers, in eval mode and without gradient.

    Weights of the wanted type (by default their own) are shared, not copied.

    Raises:
        UnsupportedThreat: as :func:`layers_of`.
    """
    return nn.Sequential(*(_rebuilt(layer, dtype) for layer in layers_of(network))).eval().requires_grad_(False)


def no_rule(layer: nn.Module) -> UnsupportedThreat:
    """The error for a layer whose type has no rule."""
    name = type(layer).__name__
    instead = f"Use {INSTEAD[name]}. " if name in INSTEAD else ""
    return UnsupportedThreat(
        f"no interval rule for layer {name}.",
        hint=f"{instead}Allowed, without hooks: {ALLOWED}.",
    )


def check_padding(layer: nn.Conv2d) -> None:
    """Raise unless a convolution pads with zeros, by numbers."""
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise UnsupportedThreat(
            f"interval bounds need convolutions with numeric zero padding, not {layer.padding_mode} padding {layer.padding!r}.",
            hint="Use padding_mode='zeros' and whole numbers, for example padding=1.",
        )


def _refused(layer: nn.Module, why: str, instead: str) -> UnsupportedThreat:
    return UnsupportedThreat(
        f"layer {type(layer).__name__} has no interval rule as it is: {why}.", hint=f"{instead[:1].upper()}{instead[1:]}."
    )


def _check(layer: nn.Module) -> None:
    kind = type(layer)
    if kind is not nn.Sequential and kind not in KNOWN:
        like = next((known.__name__ for known in (nn.Sequential, *KNOWN) if isinstance(layer, known)), None)
        if like is None:
            raise no_rule(layer)
        raise _refused(layer, f"it is a kind of {like} that may compute something else", f"use {like} itself, with plain weights")
    own = next((name for name in vars(layer) if callable(getattr(kind, name, None))), None)
    if own is not None:
        raise _refused(layer, f"its own '{own}' replaces that of its class", f"delete the attribute '{own}'")
    if layer._forward_hooks or layer._forward_pre_hooks:
        raise _refused(layer, "it has hooks, which may alter what it computes", "remove the hooks")
    if layer._compiled_call_impl is not None:
        raise _refused(layer, "it is compiled", "certify the network that was compiled")
    wrong = _wrong_option(layer)
    if wrong:
        raise _refused(layer, *wrong)
    for name in ("weight", "bias", "running_mean", "running_var", "scale", "shift"):
        tensor = getattr(layer, name, None)
        if tensor is not None and type(tensor) not in (Tensor, nn.Parameter):
            raise _refused(layer, f"its {name} is a {type(tensor).__name__}", "give it a plain tensor")


def _check_process() -> None:
    """Raise if torch itself has been altered."""
    if modules._global_forward_hooks or modules._global_forward_pre_hooks:
        raise UnsupportedThreat(
            "there are global forward hooks, which may alter what every layer computes.", hint="Remove them before certifying."
        )
    changed = next((f"{owner}.{name}" for (owner, name), code in _code().items() if code is not _ORIGINAL[owner, name]), None)
    if changed:
        raise UnsupportedThreat(
            f"{changed} is not torch's own any more: something in this process has replaced it.",
            hint="Undo that, or certify in a process of its own.",
        )


def _whole(value: object, least: int) -> bool:
    return type(value) is int and value >= least


def _sides(value: object, least: int) -> bool:
    """Whether an option is one whole number, or two."""
    both = value if isinstance(value, tuple | list) and len(value) == 2 else (value,)
    return all(_whole(side, least) for side in both)


def _wrong_option(layer: nn.Module) -> tuple[str, str] | None:
    """What is wrong with the options of a layer, and what to do about it."""
    options: Any = layer
    if isinstance(layer, nn.Conv2d):
        check_padding(layer)
        fits = _sides(layer.stride, 1) and _sides(layer.padding, 0) and _sides(layer.dilation, 1) and _whole(layer.groups, 1)
        return (
            None
            if fits
            else ("stride, padding, dilation or groups are not whole numbers in range", "use 1 or more, padding 0 or more")
        )
    if isinstance(layer, nn.AvgPool2d) and not (layer.divisor_override is None or _whole(layer.divisor_override, 1)):
        return f"divisor_override is {layer.divisor_override}", "use a whole number of 1 or more, or None"
    if isinstance(layer, nn.MaxPool2d) and layer.return_indices:
        return "return_indices gives two results", "use return_indices=False"
    if isinstance(layer, nn.MaxPool2d | nn.AvgPool2d):
        fits = _sides(options.kernel_size, 1) and _sides(options.stride, 1) and _sides(options.padding, 0)
        fits = fits and _sides(getattr(options, "dilation", 1), 1)
        return None if fits else ("kernel_size, stride or padding are not whole numbers in range", "use one whole number, or two")
    if isinstance(layer, nn.AdaptiveAvgPool2d):
        size = layer.output_size
        each = size if isinstance(size, tuple | list) and len(size) == 2 else (size,)
        fits = all(side is None or _whole(side, 1) for side in each)
        return None if fits else (f"output_size is {size}", "use one whole number, or two")
    if isinstance(layer, nn.Flatten) and not (_whole(layer.start_dim, 1) and type(layer.end_dim) is int):
        return f"start_dim is {layer.start_dim}, which may join images", "use start_dim=1 or more"
    if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
        if (layer.weight is None) != (layer.bias is None) or layer.affine != (layer.weight is not None):
            return "it has a weight or a bias, but not both", "use affine=True, or affine=False"
        return None if layer.eps >= 0 else (f"eps is {layer.eps}", "use 0 or more")
    return None


def _rebuilt(layer: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A layer of the same type from the plain numbers of ``layer``, which has passed :func:`_check`."""
    old: Any = layer
    if isinstance(layer, IDENTITY):
        return nn.Identity()
    if isinstance(layer, nn.ReLU):
        return nn.ReLU()
    if isinstance(layer, nn.Flatten):
        return nn.Flatten(layer.start_dim, layer.end_dim)
    if isinstance(layer, nn.MaxPool2d):
        return nn.MaxPool2d(old.kernel_size, old.stride, old.padding, old.dilation, ceil_mode=bool(old.ceil_mode))
    if isinstance(layer, nn.AvgPool2d):
        more = (bool(old.ceil_mode), bool(old.count_include_pad), old.divisor_override)
        return nn.AvgPool2d(old.kernel_size, old.stride, old.padding, *more)
    if isinstance(layer, nn.AdaptiveAvgPool2d):
        return nn.AdaptiveAvgPool2d(old.output_size)
    if isinstance(layer, Normalize):
        return _with(Normalize([0.0], [1.0]), layer, dtype, ("scale", "shift"))
    if isinstance(layer, nn.Linear):
        width, inputs = layer.weight.shape
        made: nn.Module = nn.Linear(inputs, width, bias=layer.bias is not None, device="meta")
        return _with(made, layer, dtype, ("weight", "bias"))
    if isinstance(layer, nn.Conv2d):
        width, inputs, *kernel = layer.weight.shape
        convolution: Callable[..., nn.Module] = nn.Conv2d
        made = convolution(
            inputs * layer.groups,
            width,
            tuple(kernel),
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
            bias=layer.bias is not None,
            device="meta",
        )
        return _with(made, layer, dtype, ("weight", "bias"))
    if old.running_mean is None or old.running_var is None:
        raise UnsupportedThreat("batch norm without running statistics mixes images.", hint="Freeze it first.")
    made = type(old)(len(old.running_mean), eps=float(old.eps), affine=old.weight is not None, device="meta")
    return _with(made, layer, dtype, ("weight", "bias", "running_mean", "running_var"))


def _with(made: nn.Module, layer: nn.Module, dtype: torch.dtype | None, names: tuple[str, ...]) -> nn.Module:
    """``made`` with the tensors of ``layer``."""
    for name in names:
        tensor = getattr(layer, name)
        if tensor is None:
            continue
        plain = tensor.detach().to(dtype or tensor.dtype).contiguous()
        if name in made._parameters:
            plain = nn.Parameter(plain, requires_grad=False)
        setattr(made, name, plain)
    if isinstance(made, nn.BatchNorm1d | nn.BatchNorm2d):
        made.num_batches_tracked = None
    return made
