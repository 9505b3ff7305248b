"""Networks of timm, tiny and with random weights: what is known of them, their preprocessing, and names that are none."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

pytest.importorskip("timm")

from patchcert_cli import models
from patchcert_cli.errors import IntegrityError, MachineError, UnknownName, UsageError
from patchcert_cli.models import timm

TINY = "test_vit.r160_in1k"  # timm's own network for tests
VIT = "vit_base_patch16_224.augreg2_in21k_ft_in1k"


def build(**changes: Any) -> Any:
    options = {**timm.facts(TINY).options(), "input_shape": (3, 20, 20), "classes": 4}
    return models.build("timm", options | changes).eval()


def test_what_timm_says_of_published_weights() -> None:
    facts = timm.facts(VIT)
    assert (facts.architecture, facts.repo, facts.outputs) == ("vit_base_patch16_224", f"timm/{VIT}", 1000)
    assert (facts.channels, facts.size, str(facts.resize_crop)) == (3, (224, 224), "224/248")
    assert facts.mean == facts.std == (0.5, 0.5, 0.5) and facts.interpolation == "bicubic" and facts.heads == ("head",)
    assert facts.labels[0][:2] == ("n01440764", "tench") and len(facts.labels) == 1000
    assert timm.word("n02510455") == "giant panda" and timm.word("n99999999") == "n99999999"
    assert timm.facts("test_vit") == timm.facts(TINY)


def test_a_network_is_rebuilt_from_its_options_and_owns_its_preprocessing() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network, again = build(), build()
    assert models.describe(network).startswith("timm test_vit at 160x160, 0.3")
    again.load_state_dict(network.state_dict(), strict=True)
    x = torch.rand(2, 3, 20, 20)
    assert torch.equal(network(x), again(x)) and network(x).shape == (2, 4)
    given = torch.nn.functional.interpolate(x, (160, 160), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    torch.testing.assert_close(network(x), network.model((given - 0.5) / 0.5))
    assert torch.equal(network(x[:, :1]), network(x[:, :1].repeat(1, 3, 1, 1)))


@pytest.mark.parametrize(
    ("changes", "shape", "size"),
    [
        ({"size": 32}, (3, 20, 20), (32, 32)),
        ({"size": [32, 48]}, (3, 20, 20), (32, 48)),
        ({"size": []}, (3, 64, 32), (64, 32)),
        ({"size": [], "mean": [0.5], "std": [0.5], "input_shape": (1, 32, 32)}, (1, 32, 32), (32, 32)),
    ],
)
def test_other_sizes_and_channels(changes: dict[str, Any], shape: tuple[int, int, int], size: tuple[int, int]) -> None:
    network = build(**({"input_shape": shape} | changes))
    assert network.size == size and network(torch.rand(2, *shape)).shape == (2, 4)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("test_vitt", r"no timm network 'test_vitt'. Did you mean test_vit"),
        ("resnet19", r"Did you mean resnet18.*See: https://huggingface.co/timm"),
        ("vit-base-patch16-225", "Did you mean vit_base_patch16_224"),
        ("zzzz", r"no timm network 'zzzz'. See: https://huggingface.co/timm"),
        ("test_vit.r160", "no weights of test_vit 'r160'. Did you mean r160_in1k"),
        ("hf-hub:somebody/net", "no timm network"),
    ],
)
def test_names_that_timm_does_not_have(name: str, said: str) -> None:
    with pytest.raises(UnknownName, match=said) as caught:
        timm.facts(name)
    assert caught.value.code == 3 and len(str(caught.value)) < 300


def test_options_that_cannot_be_meant() -> None:
    with pytest.raises(UsageError, match=r"size \[1, 2, 3\] is not an image size"):
        build(size=[1, 2, 3])
    with pytest.raises(UnknownName, match="no timm network 'none'"):
        build(architecture="none")
    with pytest.raises(IntegrityError, match="cannot be built from its options"):
        build(arguments={"colour": "red"})
    for name in ("pretrained", "pretrained_cfg", "checkpoint_path", "cache_dir"):  # a stranger's config fetches nothing
        with pytest.raises(IntegrityError, match=f"{name} is not an argument of a network"):
            build(arguments={name: "/tmp/weights.pth"})
    assert build(arguments={"global_pool": "avg"})(torch.rand(1, 3, 20, 20)).shape == (1, 4)


def test_without_timm_it_is_said_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert timm.word("n02510455") == "n02510455"
    for ask in (lambda: timm.facts(TINY), build, timm.imagenet_labels):
        with pytest.raises(MachineError, match=r'timm is not installed. Type: pip install "patchcert\[timm\]"') as caught:
            ask()
        assert caught.value.code == 7


def test_a_repository_in_timms_format_is_described() -> None:
    said: dict[str, Any] = {"input_size": [3, 64, 48], "num_classes": 2, "mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]}
    facts = timm.described("test_vit", {**said, "crop_pct": 1.0, "interpolation": "lanczos", "classifier": ["head", "aux"]})
    assert (facts.size, str(facts.resize_crop), facts.outputs, facts.interpolation) == (
        (64, 48),
        "64x48/64x48,lanczos",
        2,
        "bicubic",
    )
    assert facts.heads == ("head", "aux") and facts.labels == ()
    for names, wanted in (
        (["cat", "dog"], (("cat",), ("dog", "a dog"))),
        ({"0": "cat", "1": "dog"}, (("cat",), ("dog", "a dog"))),
        (["cat"], ()),
        ({"0": "cat", "7": "dog"}, ()),
    ):
        told = timm.described("test_vit", {**said, "label_names": names, "label_descriptions": {"dog": "a dog"}})
        assert told.labels == wanted
    assert timm.described("test_vit", {}).labels[999][0] == "n15075141"
    with pytest.raises((TypeError, ValueError)):
        timm.described("test_vit", {"input_size": 3})


def test_older_weights_are_read_as_timm_reads_them() -> None:
    """ResMLP was first published with other names than timm gives its layers."""
    facts = timm.facts("resmlp_12_224")
    network: Any = models.build("timm", {**facts.options(), "input_shape": (3, 224, 224), "classes": 1000})
    wanted = network.model.state_dict()
    older = {}
    for name, value in wanted.items():
        for new, old in (("stem.", "patch_embed."), ("linear_tokens.", "attn."), ("mlp_channels.", "mlp."), ("ls", "gamma_")):
            name = name.replace(new, old)
        older[name] = value.flatten() if name.endswith((".alpha", ".beta")) else value
    assert older.keys() != wanted.keys()
    found = timm.converted(facts, older)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    with pytest.raises(RuntimeError):
        timm.converted(facts, {"other.weight": torch.zeros(3)})
