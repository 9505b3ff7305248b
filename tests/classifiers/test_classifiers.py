"""Addresses of plain classifiers: timm's, repositories in its format, own code; what is refused, and what is recorded."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from own_models import lines, module

from patchcert_cli import checkpoint, models
from patchcert_cli.classifiers import addresses
from patchcert_cli.errors import DataError, HubError, IntegrityError, UnknownName, UsageError
from patchcert_cli.hub import client
from patchcert_cli.layers.preprocessing import WithPreprocessing
from patchcert_cli.models import timm
from patchcert_cli.storage import files

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TINY, REPO = "test_resnet.r160_in1k", "timm/test_resnet.r160_in1k"
needs_timm = pytest.mark.usefixtures("timm_library")


@pytest.fixture
def timm_library() -> None:
    pytest.importorskip("timm")


@pytest.fixture
def mine(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """A module of one's own in the current folder, under a name that nothing else has."""
    return module(tmp_path, f"mine_{abs(hash(request.node.nodeid))}")


def weights(path: Path, classes: int = 1000, network: str = TINY, seed: int = 1) -> dict[str, torch.Tensor]:
    """Random weights of a timm network in a safetensors file, as its publisher would name them."""
    facts = timm.facts(network)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made: Any = models.build("timm", {**facts.options(), "input_shape": (3, 160, 160), "classes": classes})
    tensors: dict[str, torch.Tensor] = made.model.state_dict()
    files.write_atomically(path, checkpoint.pack(tensors, {}))
    return tensors


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that serves every file asked of the Hub."""
    folder = tmp_path / "snapshot"
    folder.mkdir()

    def fetch(repo: str, revision: str | None, names: list[str], *, hint: str = "") -> tuple[str, Path]:
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            raise HubError(f"{repo} holds no {missing[0]}.", hint=hint)
        return COMMIT, folder

    monkeypatch.setattr(client, "fetch_unlisted", fetch)
    return folder


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("timm:resnet18", True),
        ("hf-hub:org/net@main", True),
        ("mine:build", True),
        ("a.b_c.d:make", True),
        ("cifar-bagcert-rf7", False),
        ("runs/x", False),
        ("org/model@main", False),
        ("C:/model", False),
        (":build", False),
    ],
)
def test_addresses_are_told_from_names_of_certified_models(text: str, is_one: bool) -> None:
    assert addresses.is_address(text) is is_one


@needs_timm
def test_published_weights_are_those_of_the_commit_that_served(cached: Path) -> None:
    tensors = weights(cached / files.WEIGHTS)
    found = addresses.open_(f"timm:{TINY}")
    assert (found.source, found.sha256) == ("hub", files.sha256(cached / files.WEIGHTS))
    assert found.resize_crop is not None and (found.resize_crop.size, found.resize_crop.target) == ((160, 160), (168, 168))
    assert found.setting["commit"] == COMMIT and f"pin it with timm:{TINY}@{COMMIT}" in found.note
    assert f"{REPO} @ {COMMIT[:7]}" in found.note
    assert "pin it" not in addresses.open_(f"timm:{TINY}@{COMMIT}").note
    assert isinstance(found.network, WithPreprocessing) and not found.network.training
    assert all(torch.equal(value, tensors[name]) for name, value in found.network.model.state_dict().items())
    assert found.names[0][:2] == ("n01440764", "tench") and addresses.outputs(found, (3, 32, 32)) == 1000


@needs_timm
def test_own_weights_of_a_known_network_have_no_names(tmp_path: Path, cached: Path) -> None:
    weights(tmp_path / "w.safetensors", 3)
    found = addresses.open_(f"timm:{TINY}", weights="w.safetensors")
    assert (found.source, found.names, addresses.outputs(found, (3, 160, 160))) == ("file", (), 3)
    named = addresses.open_(f"timm:{TINY}", weights="w.safetensors", classes=str(lines(tmp_path / "names.txt", "a", "b", "c")))
    assert named.names == (("a",), ("b",), ("c",))
    assert len(addresses.open_(f"timm:{TINY}", weights="w.safetensors", classes="imagenet").names) == 1000
    for name, said in (("test_vit", r"does not fit timm's test_vit: missing cls_token; .* and \d+ more"), (TINY, "is missing")):
        given = "none.safetensors" if name == TINY else "w.safetensors"
        with pytest.raises(IntegrityError, match=said) as caught:
            addresses.open_(f"timm:{name}", weights=given)
        assert caught.value.code == 5
    with pytest.raises(IntegrityError, match="looks like a pickle"):
        addresses.open_(f"timm:{TINY}", weights="w.pth")
    with pytest.raises(DataError, match="cannot be read"):
        addresses.open_(f"timm:{TINY}", weights="w.safetensors", classes="none.txt")


@needs_timm
def test_random_weights_say_so() -> None:
    found = addresses.open_(f"timm:{TINY}", weights="none")
    assert found.source == "random" and "mean nothing" in found.note and len(found.names) == 1000


@needs_timm
def test_weights_that_cannot_be_had_say_what_to_type(cached: Path) -> None:
    with pytest.raises(HubError, match=rf"{REPO} holds no model.safetensors. Or give the weights as a file: --weights") as caught:
        addresses.open_(f"timm:{TINY}")
    assert caught.value.code == 4
    with pytest.raises(UsageError, match="timm has no published weights for seresnet18. Give some: --weights"):
        addresses.open_("timm:seresnet18")
    with pytest.raises(UsageError, match="gives no classes: it has 0 outputs"):
        addresses.open_("timm:vit_small_patch14_dinov2.lvd142m")


@needs_timm
def test_a_repository_in_timms_format(cached: Path) -> None:
    weights(cached / files.WEIGHTS, 3)
    said: dict[str, Any] = {
        "architecture": "test_resnet",
        "num_classes": 3,
        "label_names": ["cat", "dog", "fox"],
        "pretrained_cfg": {"input_size": [3, 64, 64], "mean": [0.4] * 3, "std": [0.2] * 3, "crop_pct": 1.0, "classifier": "fc"},
    }
    (cached / files.CONFIG).write_text(json.dumps(said))
    address = f"hf-hub:somebody/net@{COMMIT}"
    found = addresses.open_(address)
    assert "pin it" not in found.note
    assert f"pin it with {address}" in addresses.open_("hf-hub:somebody/net@main").note
    assert found.names == (("cat",), ("dog",), ("fox",))
    assert found.resize_crop is not None and (found.resize_crop.size, found.resize_crop.target) == ((64, 64), (64, 64))
    assert found.setting["preprocessing"]["mean"] == [0.4] * 3 and found.setting["commit"] == COMMIT
    for change, kind, words in (
        ({"architecture": None}, IntegrityError, "names no architecture of timm"),
        ({"architecture": "resnet19"}, UnknownName, "no timm network 'resnet19'"),
        ({"defense": "ibp"}, UsageError, f"somebody/net is a model of patchcert. Use somebody/net@{COMMIT}"),
        ({"pretrained_cfg": {"input_size": 3}}, IntegrityError, "does not describe a network of timm"),
        ({"model_args": {"checkpoint_path": "w.pth"}}, IntegrityError, "checkpoint_path is not an argument of a network"),
    ):
        (cached / files.CONFIG).write_text(json.dumps(said | change))
        with pytest.raises(kind, match=words):
            addresses.open_(address)
    with pytest.raises(UsageError, match="names no revision. Pin one: hf-hub:ORG/REPO@COMMIT"):
        addresses.open_("hf-hub:somebody/net")


def test_own_code_states_its_preprocessing_itself(mine: str) -> None:
    found = addresses.open_(f"{mine}:named", typed=True)
    assert (found.names, found.mean, found.source) == ((("cat",), ("dog",), ("red fox",)), (0.5,) * 3, "code")
    assert found.resize_crop is not None and found.resize_crop.size == (16, 16)
    grey = torch.full((3, 3, 20, 24), 1.0) * torch.tensor([40, 130, 220])[:, None, None, None] / 255
    assert found.network(grey).argmax(dim=1).tolist() == [0, 1, 2]
    assert addresses.outputs(found, (3, 20, 24)) == 3
    raw = addresses.open_(f"{mine}:raw", typed=True)
    assert (raw.resize_crop, raw.mean, raw.names) == (None, None, ())
    x = torch.rand(2, 3, 5, 5)
    torch.testing.assert_close(raw.network(x), x.mean(dim=(2, 3)))


def test_own_code_and_weights_make_the_identity(mine: str, tmp_path: Path) -> None:
    found = addresses.open_(f"{mine}:build", typed=True)
    again = addresses.open_(f"{mine}:build", typed=True)
    assert found.sha256 == again.sha256 and found.setting == again.setting
    other = {"centre": torch.tensor([0.9, 0.5, 0.1])}
    files.write_atomically(tmp_path / "w.safetensors", checkpoint.pack(other, {}))
    loaded = addresses.open_(f"{mine}:build", weights="w.safetensors", typed=True)
    assert loaded.sha256 != found.sha256 and "weights in 'w.safetensors'" in loaded.note
    assert torch.equal(loaded.network.state_dict()["model.centre"], other["centre"])
    files.write_atomically(tmp_path / "w.safetensors", checkpoint.pack({"centre": torch.zeros(4)}, {}))
    with pytest.raises(IntegrityError, match=r"does not fit .*:build: centre has shape \(4,\) instead of \(3,\)"):
        addresses.open_(f"{mine}:build", weights="w.safetensors", typed=True)
    before = found.setting["code_sha256"]
    (tmp_path / f"{mine}_b.py").write_text((tmp_path / f"{mine}.py").read_text() + "# changed\n")
    assert before and addresses.open_(f"{mine}_b:build", typed=True).setting["code_sha256"] != before


@pytest.mark.parametrize("typed", [False, True])
def test_code_is_imported_only_where_its_address_was_typed(mine: str, typed: bool) -> None:
    if typed:
        addresses.open_(f"{mine}:build", typed=True)
    else:
        with pytest.raises(UsageError, match="is not an address of a classifier. Use timm:NAME"):
            addresses.open_(f"{mine}:build")
    assert (mine in sys.modules) is typed


@pytest.mark.parametrize(
    ("function", "kind", "said"),
    [
        ("raises", UsageError, "fails: ValueError: no luck. It is called without arguments"),
        ("number", UsageError, "returns int. It must return a torch.nn.Module"),
        ("biuld", UnknownName, "Did you mean build"),
        ("sizes", UsageError, r"states size \(1, 2, 3\)"),
        ("half", UsageError, "must state mean and std together"),
        ("broken", IntegrityError, "answers NaN or infinity for images"),
        ("maps", IntegrityError, r"of shape \(2, 3, 8, 8\) .* It must return logits \[B, K\]"),
        ("pairs", IntegrityError, r"returns tuple for images \(2, 3, 8, 8\)"),
        ("fails", IntegrityError, "fails for images .*: RuntimeError: shape"),
        ("quits", IntegrityError, "fails for images .*: SystemExit: 0"),
    ],
)
def test_own_code_that_is_no_classifier(mine: str, function: str, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said) as caught:
        addresses.outputs(addresses.open_(f"{mine}:{function}", typed=True), (3, 8, 8))
    assert "\n" not in str(caught.value)


def test_modules_that_cannot_be_imported(tmp_path: Path) -> None:
    (tmp_path / "mine_syntax.py").write_text("def (:")
    (tmp_path / "mine_needs.py").write_text("import surely_not_installed")
    (tmp_path / "mine_script.py").write_text("import sys\nsys.exit(0)")
    (tmp_path / "mine_ends.py").write_text("import sys\ndef build():\n    sys.exit(3)")
    for address, kind, said in (
        ("surely_not_there:build", UnknownName, "no module 'surely_not_there'. Install it, or go to the folder that holds it"),
        ("json.surely_not_there:build", UnknownName, "no module 'json.surely_not_there'"),
        ("mine_syntax:build", UsageError, "module 'mine_syntax' cannot be imported: SyntaxError"),
        ("mine_needs:build", UsageError, "cannot be imported: ModuleNotFoundError: No module named 'surely_not_installed'"),
        ("mine_script:build", UsageError, "module 'mine_script' cannot be imported: SystemExit"),
        ("mine_ends:build", UsageError, "mine_ends:build fails: SystemExit"),
    ):
        with pytest.raises(kind, match=said):
            addresses.open_(address, typed=True)


@needs_timm
def test_training_begins_with_all_but_the_head(cached: Path, tmp_path: Path) -> None:
    tensors = weights(cached / files.WEIGHTS)
    begun = addresses.beginning(f"timm:{TINY}", None)
    assert begun.options["weights"] == f"{REPO}@{COMMIT}" and str(begun.source.resize_crop) == "160/168,bilinear"
    assert begun.options["weights_sha256"] == files.sha256(cached / files.WEIGHTS)
    network: Any = models.build("timm", {**begun.options, "input_shape": (3, 32, 32), "classes": 5})
    head = {name: value.clone() for name, value in network.model.fc.state_dict().items()}
    addresses.begin_with(network, begun.options)
    for name, value in network.model.state_dict().items():
        assert torch.equal(value, head[name[3:]] if name.startswith("fc.") else tensors[name]), name
    weights(cached / files.WEIGHTS, seed=2)
    with pytest.raises(IntegrityError, match="is not what this run began with"):
        addresses.begin_with(network, begun.options)
    weights(tmp_path / "own.safetensors", 5)
    own = addresses.beginning(f"timm:{TINY}", "own.safetensors")
    addresses.begin_with(network, own.options)
    weights(tmp_path / "vit.safetensors", network="test_vit")
    with pytest.raises(IntegrityError, match="'vit.safetensors' does not fit timm's test_resnet"):
        addresses.begin_with(network, addresses.beginning(f"timm:{TINY}", "vit.safetensors").options)


@needs_timm
def test_what_training_cannot_begin_with(cached: Path) -> None:
    assert "weights" not in addresses.beginning(f"timm:{TINY}", "none").options
    assert addresses.beginning(f"timm:{TINY}", None, fetch=False).options["weights"] == REPO
    with pytest.raises(HubError, match="Or begin with random weights: --weights none"):
        addresses.beginning(f"timm:{TINY}", None)
    with pytest.raises(IntegrityError, match="'none.safetensors' cannot be read: No such file"):
        addresses.beginning(f"timm:{TINY}", "none.safetensors")
    with pytest.raises(UsageError, match="'mine:build' cannot be trained: .* can name no code"):
        addresses.beginning("mine:build", None)
    with pytest.raises(UsageError, match="no weights are published for timm:seresnet18"):
        addresses.beginning("timm:seresnet18", None)
