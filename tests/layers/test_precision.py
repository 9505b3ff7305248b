"""Where a proof computes, everything is off that computes in less, or otherwise; afterwards it is as it was before."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from patchcert_cli.certifiers.masks.masked_predictions import one_way
from patchcert_cli.layers import precision
from patchcert_cli.layers.precision import exact_arithmetic, exact_sums, plain_sums

Block = Callable[[], contextlib.AbstractContextManager[None]]
cudnn: Any = torch.backends.cudnn
SET: list[tuple[Any, str, Any]] = [
    (cudnn, "benchmark", True),
    (cudnn, "allow_tf32", True),
    (torch.backends.cuda.matmul, "allow_tf32", True),
    (precision._MatmulPrecision(), "value", "medium"),
]


@contextlib.contextmanager
def everything_fast() -> Iterator[None]:
    """The settings of a program that wants speed."""
    before = [getattr(owner, name) for owner, name, _ in SET]
    try:
        for owner, name, fast in SET:
            setattr(owner, name, fast)
        with torch.autocast("cpu", torch.bfloat16):
            yield
    finally:
        for (owner, name, _), value in zip(SET, before, strict=True):
            setattr(owner, name, value)


def settings() -> dict[str, Any]:
    names = {"benchmark": cudnn.benchmark, "allow_tf32": cudnn.allow_tf32, "matmul": torch.backends.cuda.matmul.allow_tf32}
    enabled = {"cudnn": cudnn.enabled, "mkldnn": torch.backends.mkldnn.enabled, "nnpack": torch._C._get_nnpack_enabled()}
    names["value"] = torch.get_float32_matmul_precision()
    return {**names, **enabled, "deterministic": cudnn.deterministic, "autocast": torch.is_autocast_enabled("cpu")}


def fails_inside(block: contextlib.AbstractContextManager[None]) -> dict[str, Any]:
    """The settings inside, of a block that is left by an exception."""
    inside: dict[str, Any] = {}

    def work() -> None:
        with block:
            inside.update(settings())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    return inside


def test_each_setting_is_exact_inside_and_restored_after_an_exception() -> None:
    with everything_fast():
        before = settings()
        assert before["benchmark"] and before["value"] == "medium" and before["autocast"]
        for block, fast_ways in ((exact_arithmetic(), True), (plain_sums(), False)):
            inside = fails_inside(block)
            assert not any(inside[name] for name in ("benchmark", "allow_tf32", "autocast", "nnpack"))
            assert inside["value"] == "highest"
            assert inside["cudnn"] == inside["mkldnn"] == fast_ways
            assert settings() == before


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="this torch has no newer interface")
@pytest.mark.parametrize("block", [exact_arithmetic, plain_sums])
def test_the_newer_interface_is_restored_as_well(block: Block) -> None:
    backends: Any = torch.backends
    owners = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul, backends.mkldnn.conv]
    before, fast = [owner.fp32_precision for owner in owners], ["tf32", "tf32", "tf32", "bf16", "bf16"]
    inside: list[str] = []

    def work() -> None:
        with block():
            inside.extend(owner.fp32_precision for owner in owners)
            raise ZeroDivisionError

    try:
        for owner, value in zip(owners, fast, strict=True):
            owner.fp32_precision = value
        with pytest.raises(ZeroDivisionError):
            work()
        assert inside == ["ieee"] * len(owners)
        assert [owner.fp32_precision for owner in owners] == fast
    finally:
        for owner, value in zip(owners, before, strict=True):
            owner.fp32_precision = value


def test_whole_numbers_are_summed_plainly_where_nothing_compares_the_sums() -> None:
    found = {kind: fails_inside(exact_sums(torch.device(kind))) for kind in ("cpu", "cuda")}
    assert found["cpu"]["cudnn"] and found["cpu"]["mkldnn"]
    assert not found["cuda"]["cudnn"] and not found["cuda"]["mkldnn"]


@pytest.mark.parametrize("inner", [exact_arithmetic, plain_sums, lambda: one_way(torch.device("cpu"))])
@pytest.mark.parametrize("outer", [plain_sums, lambda: one_way(torch.device("cpu"))])
def test_another_thread_changes_nothing_inside_a_proof_and_leaves_nothing_changed(outer: Block, inner: Block) -> None:
    """Settings belong to the process. A second thread that left its block would restore them inside the first one's."""
    before, entered, left = settings(), threading.Event(), threading.Event()

    def second() -> None:
        with inner():
            entered.set()
            left.wait(10)

    thread = threading.Thread(target=second)
    with outer():
        inside = settings()
        thread.start()
        assert not entered.wait(0.05), "two threads are inside"
        assert settings() == inside
    assert entered.wait(10)
    left.set()
    thread.join(10)
    assert settings() == before and not thread.is_alive()


def test_measured_predictions_take_one_algorithm_and_restore_the_choice() -> None:
    with everything_fast():
        before, threads = settings(), torch.get_num_threads()
        inside = fails_inside(one_way(torch.device("cuda")))
        assert not inside["benchmark"] and inside["deterministic"]
        assert settings() == before and torch.get_num_threads() == threads
