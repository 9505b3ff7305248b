"""Own code in its wrappers, networks of torchvision, ONNX files: accepted or refused in one line, and what is recorded."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision  # type: ignore[import-untyped]
from torch import Tensor, nn

from patchcert_cli import checkpoint
from patchcert_cli.certifiers.masks.mask_sets import MaskSpec
from patchcert_cli.classifiers import addresses, loaders, normalization, user_code
from patchcert_cli.defenses.patchcleanser import PatchCleanser
from patchcert_cli.errors import HubError, IntegrityError, MachineError, UnknownName, UsageError
from patchcert_cli.evaluation.models import put_around
from patchcert_cli.layers.preprocessing import WithPreprocessing
from patchcert_cli.storage import files
from patchcert_cli.threats import Patch

OWN = '''
import threading
import torch
from torch import nn


class Net(nn.Module):
    """Normalizes as ``how`` says, and states mean and std."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.mean, self.std = (torch.tensor(one).view(3, 1, 1) for one in ([0.4, 0.5, 0.6], [0.2, 0.3, 0.2]))
        if how == "layer":
            self.normalize = Normalize()
        after = (nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), *after)

    def forward(self, x):
        x = {"itself": lambda: (x - self.mean) / self.std, "wrong": lambda: x * self.std}.get(self.how, lambda: x)()
        return self.body(self.normalize(x) if self.how == "layer" else x)


class Normalize(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mu", torch.tensor([[[[0.4]], [[0.5]], [[0.6]]]]))
        self.register_buffer("sigma", torch.tensor([[[[0.2]], [[0.3]], [[0.2]]]]))

    def forward(self, x):
        return (x - self.mu) / self.sigma


def make(how="front"):
    torch.manual_seed(0)
    return Net(how)


def front(): return make()
def itself(): return make("itself")
def layer(): return make("layer")
def wrong(): return make("wrong")
def parallel(): return nn.DataParallel(make().body)
def lazy(): return nn.Sequential(nn.Flatten(), nn.LazyLinear(3))
def needs(classes): return make()
def locked():
    made = make()
    made.lock = threading.Lock()
    return made
def pool(): return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
'''
X = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def mine(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    name = f"own_{abs(hash(request.node.nodeid))}"
    (tmp_path / f"{name}.py").write_text(OWN)
    return name


def around(found: addresses.Classifier) -> PatchCleanser:
    made = put_around(
        found.network, "patchcleanser", (3, 8, 8), ("a", "b", "c"), MaskSpec(("patch:2x2",), per_axis=3), found.mean
    )
    assert isinstance(made, PatchCleanser)
    return made


@pytest.mark.parametrize("how", ["front", "itself", "layer"])
def test_images_are_normalized_once(mine: str, how: str) -> None:
    found, notes = loaders.settled(addresses.open_(f"{mine}:{how}", typed=True), (3, 8, 8))
    normalized = (X - torch.tensor([0.4, 0.5, 0.6])[:, None, None]) / torch.tensor([0.2, 0.3, 0.2])[:, None, None]
    assert isinstance(found.network, WithPreprocessing)
    with torch.no_grad():
        torch.testing.assert_close(found.network(X), found.network.model.body(normalized))
    if how == "front":
        assert notes == [] and "minus mean 0.4 0.5 0.6, divided by std 0.2 0.3 0.2" in found.in_front
    else:
        assert notes == [f"{mine}:{how} normalizes by its mean and std itself, so this is not done a second time before it"]
        assert found.in_front == "pixels in [0, 1], as they are" and found.setting["preprocessing"]["normalized_by_itself"]
    assert torch.equal(found.network.model.mean.flatten(), torch.tensor([0.4, 0.5, 0.6])), "nothing of it stays replaced"


def test_statistics_that_are_used_otherwise_are_refused(mine: str) -> None:
    with pytest.raises(UsageError, match="states mean and std, and uses them itself, but not to normalize what it is given"):
        loaders.settled(addresses.open_(f"{mine}:wrong", typed=True), (3, 8, 8))


def test_no_weights_given_is_said(mine: str) -> None:
    assert "no weights given: the network is as the function returns it" in addresses.open_(f"{mine}:front", typed=True).note
    said = addresses.open_("torchvision.models:squeezenet1_1", typed=True).note
    assert "no weights given" in said and "torchvision:squeezenet1_1 has published weights" in said


def test_all_own_modules_are_in_the_digest(tmp_path: Path) -> None:
    (tmp_path / "own_main.py").write_text(
        "import json, numpy\nimport own_helper\ndef build():\n    import own_late\n    return own_helper.net()\n"
    )
    (tmp_path / "own_helper.py").write_text("from torch import nn\ndef net(): return nn.Flatten()\n")
    (tmp_path / "own_late.py").write_text("")
    user_code.call("own_main", "build")
    read = user_code.digest("own_main")
    assert read == {name: files.sha256(tmp_path / f"{name}.py") for name in ("own_helper", "own_late", "own_main")}
    (tmp_path / "own_helper.py").write_text("changed = True\n")
    assert user_code.digest("own_main") == read, "what runs is what was loaded"
    for name in read:
        del sys.modules[name]
    (tmp_path / "own_helper.py").write_text("from torch import nn\ndef net(): return nn.Sequential(nn.Flatten())\n")
    user_code.call("own_main", "build")
    assert user_code.digest("own_main")["own_helper"] != read["own_helper"]


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_weights_fit_whatever_wrapped_the_network_when_they_were_saved(mine: str, prefix: str) -> None:
    plain = addresses.open_(f"{mine}:front", typed=True)
    assert isinstance(plain.network, WithPreprocessing)
    state = {prefix + name: value + 1 for name, value in plain.network.model.state_dict().items() if "num_batches" not in name}
    files.write_atomically(Path("w.safetensors"), checkpoint.pack(state, {}))
    found = addresses.open_(f"{mine}:front", weights="w.safetensors", typed=True)
    loaded = found.network.state_dict()
    assert all(torch.equal(loaded[f"model.{name.removeprefix(prefix)}"], value) for name, value in state.items())


def test_wrappers_are_taken_off(mine: str) -> None:
    found = addresses.open_(f"{mine}:parallel", typed=True)
    assert isinstance(found.network, WithPreprocessing) and isinstance(found.network.model, nn.Sequential)
    assert "inside DataParallel, which was taken off" in found.note
    compiled = type("OptimizedModule", (nn.Module,), {})()  # what torch.compile returns is called so
    compiled._orig_mod = nn.Linear(2, 2)
    assert user_code.unwrapped(compiled) == (compiled._orig_mod, ["torch.compile"])


@pytest.mark.parametrize(
    ("function", "said"),
    [("lazy", "returns a network whose 1.weight has no values"), ("needs", "missing 1 required positional argument: 'classes'")],
)
def test_what_cannot_be_used_is_refused_in_one_line(mine: str, function: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        addresses.open_(f"{mine}:{function}", typed=True)
    assert "\n" not in str(caught.value)


def test_networks_without_parameters_or_without_copies_are_certified(mine: str) -> None:
    pool = around(addresses.open_(f"{mine}:pool", typed=True))
    assert pool.device == torch.device("cpu") and bool(pool.certify(X, Patch(2, 2)).prediction.ge(0).all())
    free, locked = (around(addresses.open_(f"{mine}:{name}", typed=True)) for name in ("front", "locked"))
    assert free.views().calibration.double and not locked.views().calibration.double
    one, two = free.certify(X, Patch(2, 2)), locked.certify(X, Patch(2, 2))
    assert torch.equal(one.prediction, two.prediction) and not bool((two.certified & ~one.certified).any())
    with pytest.raises(UsageError, match=r"the network cannot be copied \(TypeError: .*\). Call its eval\(\) first"):
        around(addresses.open_(f"{mine}:locked", typed=True)).train().views()


def test_answers_tell_whether_a_network_is_the_same(mine: str) -> None:
    one, two = (around(addresses.open_(f"{mine}:front", typed=True)) for _ in range(2))
    first, again = one.fingerprint(), two.fingerprint()
    assert (
        first is not None
        and again is not None
        and first == again
        and first["precision"] == "float64"
        and len(first["sums"]) == 12
    )
    with torch.no_grad():
        two.network.model.body[5].bias[0] += 1e-6
    moved = two.fingerprint()
    assert moved is not None and max(abs(a - b) for a, b in zip(first["sums"], moved["sums"], strict=True)) > first["near"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torch's cache, with random weights of torchvision's smallest network that have the hash that their name says."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


def published(cache: Path, monkeypatch: pytest.MonkeyPatch, name: str = "squeezenet1_1") -> dict[str, Tensor]:
    torch.manual_seed(0)
    state = torchvision.models.get_model(name, weights=None).state_dict()
    cache.mkdir(parents=True)
    torch.save(state, cache / "new.pth")
    begin = files.sha256(cache / "new.pth")[:8]
    (cache / "new.pth").rename(cache / f"{name}-{begin}.pth")
    member = torchvision.models.get_model_weights(name).DEFAULT
    monkeypatch.setattr(type(member), "url", f"https://example.org/{name}-{begin}.pth", raising=False)
    return dict(state)


def test_published_weights_of_torchvision(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        HubError, match=r"are not at '.*squeezenet1_1-b8a52dc0.pth'. Add --download, or give them as a file"
    ) as caught:
        addresses.open_("torchvision:squeezenet1_1")
    assert caught.value.code == 4
    state = published(cache, monkeypatch)
    found = addresses.open_("torchvision:squeezenet1_1")
    assert found.source == "torchvision" and found.resize_crop is not None
    assert (found.resize_crop.size, found.resize_crop.target) == ((224, 224), (256, 256))
    assert found.mean == (0.485, 0.456, 0.406) and found.setting["preprocessing"]["interpolation"] == "bilinear"
    assert "pin it with torchvision:squeezenet1_1@IMAGENET1K_V1" in found.note and "tench" in found.names[0]
    assert all(torch.equal(found.network.state_dict()[f"model.{name}"], value) for name, value in state.items())
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(IntegrityError, match="is damaged: its sha256 does not begin with"):
        addresses.open_("torchvision:squeezenet1_1@IMAGENET1K_V1")


def test_names_and_own_weights_of_torchvision() -> None:
    for address, said in (
        ("torchvision:squeezenet1_2", "no torchvision network 'squeezenet1_2'. Did you mean squeezenet1_"),
        ("torchvision:squeezenet1_1@IMAGENET1K_V9", "no weights of squeezenet1_1 'IMAGENET1K_V9'"),
    ):
        with pytest.raises(UnknownName, match=said):
            addresses.open_(address)
    state = torchvision.models.get_model("squeezenet1_1", weights=None, num_classes=5).state_dict()
    files.write_atomically(Path("w.safetensors"), checkpoint.pack(state, {}))
    found = addresses.open_("torchvision:squeezenet1_1", weights="w.safetensors")
    assert (
        found.names == () and addresses.outputs(found, (3, 64, 64)) == 5 and found.sha256 == files.sha256(Path("w.safetensors"))
    )
    with pytest.raises(IntegrityError, match="does not fit torchvision's squeezenet1_1"):
        addresses.open_("torchvision:squeezenet1_1@IMAGENET1K_V1", weights="w.safetensors")
    assert addresses.open_("torchvision:squeezenet1_1", weights="none").random


class Runtime(ModuleType):
    """In the place of onnxruntime: networks of fixed shapes that tell brightness."""

    __version__ = "0"
    SessionOptions = SimpleNamespace

    def __init__(self, shape: list[Any], kind: str = "tensor(float)") -> None:
        super().__init__("onnxruntime")
        self.shape, self.kind, self.asked = shape, kind, []  # type: ignore[var-annotated]

    def get_available_providers(self) -> list[str]:
        return ["CPUExecutionProvider"]

    def InferenceSession(self, content: bytes, options: Any, providers: Any) -> Any:  # noqa: N802
        if content != b"network":
            raise RuntimeError("INVALID_PROTOBUF\nmore")
        one, told = (SimpleNamespace(name=n, type=self.kind, shape=s) for n, s in (("x", self.shape), ("y", [None, 2])))
        return SimpleNamespace(get_inputs=lambda: [one], get_outputs=lambda: [told], run=self.run)

    def run(self, names: list[str], given: dict[str, Any]) -> list[Any]:
        self.asked.append(given["x"].shape)
        bright = given["x"].reshape(len(given["x"]), -1).mean(axis=1)
        return [np.stack([bright, 1 - bright], axis=1)]


@pytest.mark.parametrize(
    ("shape", "asked"),
    [
        (["b", 3, 8, 8], [(4, 3, 8, 8)]),
        ([1, 3, 8, 8], [(1, 3, 8, 8)] * 4),
        ([3, 3, "h", "w"], [(3, 3, 8, 8)] * 2),
        ([None, 8, 8, 3], [(4, 8, 8, 3)]),
    ],
)
def test_an_onnx_file(monkeypatch: pytest.MonkeyPatch, shape: list[Any], asked: list[tuple[int, ...]]) -> None:
    runtime = Runtime(shape)
    monkeypatch.setitem(sys.modules, "onnxruntime", runtime)
    Path("net.onnx").write_bytes(b"network")
    found = addresses.open_("onnx:net.onnx", typed=True)
    torch.testing.assert_close(found.network(X), torch.stack([X.mean(dim=(1, 2, 3)), 1 - X.mean(dim=(1, 2, 3))], dim=1))
    assert runtime.asked == asked and found.sha256 == hashlib.sha256(b"network").hexdigest()
    made = put_around(found.network, "patchcleanser", (3, 8, 8), ("a", "b"), MaskSpec(("patch:2x2",), per_axis=3), None)
    certificate = made.certify(torch.stack([X[0] * 0.2, X[1] * 0.2 + 0.8]), "patch:2x2")
    assert (
        not made.views().calibration.double
        and certificate.prediction.tolist() == [1, 0]
        and str(certificate.arithmetic) == "measured"
    )
    assert bool(certificate.certified.all())
    with pytest.raises(UsageError, match="is an ONNX network, which has no gradient to attack by. Certify it instead"):
        made.surrogates()[0].whole(X.clone().requires_grad_())


def test_onnx_files_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("net.onnx").write_bytes(b"network")
    Path("torn.onnx").write_bytes(b"net")
    for runtime, file, kind, said in (
        (None, "net", MachineError, r'onnxruntime is not installed. Type: pip install "patchcert\[onnx\]"'),
        (Runtime(["b", 3, 8, 8]), "torn", IntegrityError, "is not a network that onnxruntime can read: INVALID_PROTOBUF"),
        (Runtime(["b", 3, 8, 8]), "none", IntegrityError, "'none.onnx' is missing"),
        (Runtime(["b", 3, 8, 8], "tensor(uint8)"), "net", UsageError, r"takes x tensor\(uint8\)"),
        (Runtime(["b", 10]), "net", UsageError, "It must take one batch of images"),
    ):
        monkeypatch.setitem(sys.modules, "onnxruntime", runtime)
        with pytest.raises(kind, match=said) as caught:
            addresses.open_(f"onnx:{file}.onnx", typed=True)
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="is not an address of a classifier"):
        addresses.open_("onnx:net.onnx")  # no card can name a file


class Rolling(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.randn(len(x), 3) + x.mean()


def test_a_random_network_is_not_taken_for_one_that_normalizes_otherwise() -> None:
    made = Rolling()
    made.mean = [0.5] * 3
    assert not normalization.twice("mine:rand", made, [0.5] * 3, [0.25] * 3, torch.rand(2, 3, 8, 8))
