"""A pretended GPU: tensors that say ``cuda``, are computed on the CPU, and refuse to be mixed with tensors of the CPU.

    with OtherDevice() as gpu:
        defense.to("cuda")
        certificate = defense.certify(x.to("cuda"), Patch(1, 1))
    assert gpu.reads == Counter(...)

The device belongs to the storage of a tensor. A function mode answers for ``device``, ``to`` and every other place where a
program names a device. A dispatch mode looks at each operation below it, those of autograd included.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

GPU = torch.device("cuda", 0)
DEVICE, IS_CUDA, IS_CPU = (cast(Any, getattr(Tensor, name)).__get__ for name in ("device", "is_cuda", "is_cpu"))
COPIES = ("_to_copy", "copy_")  # may read another device than they write
SYNCHRONIZES = {  # operations after which a program waits for a GPU, and what they are called here
    "_local_scalar_dense": "item",
    "equal": "item",
    "is_nonzero": "item",
    "nonzero": "shape",
    "_unique2": "shape",
    "unique_dim": "shape",
    "unique_consecutive": "shape",
    "masked_select": "shape",
    "bincount": "shape",
}


class Mixture(AssertionError):
    """Tensors of the GPU and of the CPU met in one operation."""


class OtherDevice(TorchFunctionMode):
    """Pretends that there is a GPU, as long as the block lasts.

    Attributes:
        reads: how often a program has waited for the GPU: ``item`` (one number, or a truth value), ``cpu`` (a tensor, ``tolist``
            included), ``shape`` (an output whose shape depends on values, as of ``nonzero``).
        sent: how often a tensor was sent to the GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()
        self.sent = 0
        self._there: dict[int, StorageWeakRef] = {}  # storages on the GPU; a weak reference keeps their address from being reused
        self._default = False  # where operations without any tensor put their output
        self._looks = _Looks(self)

    def __enter__(self) -> OtherDevice:
        self._looks.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *problem: Any) -> None:
        super().__exit__(*problem)
        self._looks.__exit__(*problem)

    def has(self, value: Any) -> bool:
        """Whether a tensor is on the GPU."""
        return isinstance(value, Tensor) and value.untyped_storage()._cdata in self._there

    def put(self, value: Any, there: bool) -> None:
        """Say that fresh tensors, in whatever they are nested, are on the GPU, or that they are not."""
        for one in tensors(value):
            if one.device.type != "meta":
                storage = one.untyped_storage()
                if there:
                    self._there[storage._cdata] = StorageWeakRef(storage)
                else:
                    self._there.pop(storage._cdata, None)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        owner = args[0] if args and isinstance(args[0], Tensor) else None
        if func == DEVICE:
            return GPU if self.has(owner) else owner.device  # type: ignore[union-attr]
        if func == IS_CUDA:
            return self.has(owner)
        if func == IS_CPU:
            return not self.has(owner) and owner.is_cpu  # type: ignore[union-attr]
        if owner is not None and name in ("to", "cpu", "cuda"):
            return self._moved(owner, name, args[1:], kwargs)
        if func is Tensor.__deepcopy__:
            copied = self._called(func, args, kwargs, self.has(owner))
            self.put(copied, self.has(owner))
            return copied
        if self.has(owner) and name in ("numpy", "__array__"):
            raise Mixture(f"{name} of a tensor on the GPU")
        if name == "pin_memory" and owner is not None:
            return owner.clone()
        if self.has(owner) and name == "tolist":
            self.reads["cpu"] += 1
        if kwargs.get("device") is not None:
            return self._placed(func, args, kwargs)
        there = any(self.has(leaf) for leaf in tensors((args, kwargs)))
        if name == "one_hot" and there:  # looks at its values on the CPU alone
            before, made = Counter(self.reads), self._called(func, args, kwargs, there)
            self.reads = before
            return made
        return self._called(func, args, kwargs, there)

    def _called(self, func: Callable[..., Any], args: Any, kwargs: Any, there: bool) -> Any:
        before, self._default = self._default, there
        try:
            return func(*args, **kwargs)
        finally:
            self._default = before

    def _placed(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """A function that names a device."""
        there = torch.device(kwargs["device"]).type == "cuda"
        if there:
            kwargs["device"] = "cpu"
            if kwargs.get("generator") is not None:
                raise Mixture("a generator of the CPU draws on the GPU")
        given = list(tensors((args, kwargs)))
        made = self._called(func, args, kwargs, there)
        if any(leaf is made for leaf in given) and self.has(made) != there:  # as_tensor
            return self._sent(made, there)
        if not any(leaf is made for leaf in given):
            self.put(made, there)
        return made

    def _moved(self, owner: Tensor, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """What ``to``, ``cpu`` and ``cuda`` return."""
        if name != "to":
            return owner if (name == "cuda") == self.has(owner) else self._sent(owner, name == "cuda")
        if args and isinstance(args[0], Tensor):
            args, like = args[1:], args[0]
            place, kind = (GPU if self.has(like) else like.device), like.dtype
            layout = kwargs.get("memory_format")
        else:
            place, kind, _, layout = torch._C._nn._parse_to(*args, **{k: v for k, v in kwargs.items() if k != "copy"})
        there = self.has(owner) if place is None else torch.device(place).type == "cuda"
        if place is not None and torch.device(place).type == "meta":
            return owner.to(*args, **kwargs)
        options: dict[str, Any] = {} if layout is None else {"memory_format": layout}
        copied = self._called(owner.to, (kind or owner.dtype,), {**options, "copy": kwargs.get("copy", False)}, self.has(owner))
        return copied if there == self.has(owner) else self._sent(copied, there)

    def _sent(self, value: Tensor, there: bool) -> Tensor:
        """A copy on the other device."""
        if there:
            self.sent += 1
        else:
            self.reads["cpu"] += 1
        copied = value.clone()
        self.put(copied, there)
        return copied


class _Looks(TorchDispatchMode):
    """Refuses mixtures, and follows tensors through every operation."""

    def __init__(self, gpu: OtherDevice) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        gpu, kwargs = self._gpu, kwargs or {}
        given = [leaf for leaf in tensors((args, kwargs)) if leaf.device.type != "meta"]
        name = func.__name__.split(".")[0]
        there = any(gpu.has(one) for one in given)
        strangers = [one for one in given if not gpu.has(one) and one.ndim]
        if there and strangers and name not in COPIES:
            raise Mixture(f"{func} of the GPU and of the CPU: {[(gpu.has(one), tuple(one.shape)) for one in given]}")
        if there and name == "copy_" and strangers and gpu.has(args[0]):
            gpu.sent += 1
        if waits := _waits(name, args, there and gpu.has(given[-1])):
            gpu.reads[waits] += 1
        made = func(*args, **kwargs)
        if name != "copy_":
            old = {one.untyped_storage()._cdata for one in given}
            fresh = [one for one in tensors(made) if one.device.type != "meta"]
            gpu.put([one for one in fresh if one.untyped_storage()._cdata not in old], there if given else gpu._default)
        return made


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested arguments."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for one in value.values() if isinstance(value, dict) else value:
            yield from tensors(one)


def _waits(name: str, args: Any, there: bool) -> str:
    """What an operation waits for, as :attr:`OtherDevice.reads` calls it; empty if for nothing."""
    if not there:
        return ""
    if name in ("index", "index_put_", "index_put", "_index_put_impl_"):
        return "shape" if any(one is not None and one.dtype == torch.bool for one in args[1]) else ""
    return SYNCHRONIZES.get(name, "")


@contextmanager
def counted(gpu: OtherDevice) -> Iterator[Counter[str]]:
    """What the block alone reads; complete after it."""
    before, own = Counter(gpu.reads), Counter[str]()
    yield own
    own.update(gpu.reads - before)
