"""Checkpoints: ``config.json`` and ``model.safetensors``, which together rebuild a defense exactly. Nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from patchcert_cli import cards, defenses
from patchcert_cli.data.datasets import Dataset
from patchcert_cli.defenses import Defense, Options
from patchcert_cli.errors import IntegrityError, UsageError, first_line
from patchcert_cli.layers.fixed_point import Quantizer
from patchcert_cli.schema import shown
from patchcert_cli.storage import files
from patchcert_cli.storage.files import CONFIG, INDEX, WEIGHTS, parse_json, refuse_pickle, shard, write_atomically, write_json
from patchcert_cli.threats import Threat

RESTORE = "Restore the file; for a model that comes with patchcert, install patchcert again."
HALF = (torch.float16, torch.bfloat16)
FORMAT = 2  # of a configuration
TOP_ENTRIES_1 = ("masks", "fill", "labels", "threshold")  # of format 1: at the top, and deployed
OPTIONS_1 = {  # of format 1: among the options of training, and deployed
    "bagcert": ("aggregate",),
    "clipped": ("clip", "slope", "middle"),
    "partition": ("layout", "spacing", "shuffle", "vote"),
    "patchguard": ("share",),
    "smoothing": ("ablation", "band", "stride", "vote", "threshold", "view"),
}
SHARD_BYTES = 5_000_000_000  # the most that one weight file holds
CONFIG_BYTES = 1 << 20  # the most that a configuration holds
ENTRIES = 256  # the most entries of a list among the options of a network, and so the most layers
SIDE = 1 << 14  # the most channels, rows or columns of an image
MODEST = 1 << 20  # weights that cost nothing to make
MOST_SHOWN = 4  # things wrong with weights that an error lists


def pack(tensors: Mapping[str, Tensor], note: Mapping[str, Any]) -> bytes:
    """Safetensors bytes, the same for the same content: all metadata in one JSON string, tensors contiguous on the CPU."""
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return save(ready, {"patchcert": json.dumps(note, sort_keys=True)})


def unpack(path: Path, content: bytes | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`pack` wrote, on the CPU; ``content`` is that of the file, if it was read before (to hash it)."""
    refuse_pickle(path)
    content = files.read(path) if content is None else content
    files.refuse_pickled(content[:9], path)
    try:
        tensors = load(content)
        end = 8 + int.from_bytes(content[:8], "little")
        note = json.loads(json.loads(content[8:end]).get("__metadata__", {}).get("patchcert", "{}"))
    except (SafetensorError, OSError, ValueError, RecursionError) as problem:
        raise IntegrityError(f"'{path}' is not an intact safetensors file: {first_line(problem)}.", hint=RESTORE) from problem
    return tensors, note


def configuration(
    kind: str, network: Mapping[str, Any], info: Dataset, threat: Threat, options: Options, recipe: Mapping[str, Any]
) -> dict[str, Any]:
    """The ``config.json`` of what is trained: all that is deployed in one section, and how it was trained beside it.

    Args:
        kind: name of the defense.
        network: its name and its options.
        info: the data set of its training images.
        threat: the threat model it is trained against.
        options: the defense's own options.
        recipe: as plain values.
    """
    return {
        "format": FORMAT,
        "deployed": {
            "defense": kind,
            "input_shape": list(info.shape),
            "classes": list(info.classes),
            "network": dict(network),
            **defenses.trainable(kind).deploy_config(threat, options),
        },
        "dataset": recipe["dataset"],
        "threat": str(threat),
        "recipe": dict(recipe),
    }


def upgraded(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """A configuration in the format of today.

    Format 1 had no section ``deployed``: its entries were at the top, and among the options of training.

    Raises:
        IntegrityError: a format that this version does not know.
    """
    known = config.get("format", 1)
    if known == FORMAT:
        return dict(config)
    if known != 1:
        raise IntegrityError(f"'{path}' is a configuration of format {shown(known)}.", hint="Update patchcert: it reads 1 and 2.")
    deployed = {name: config[name] for name in (*defenses.COMMON_ENTRIES, *TOP_ENTRIES_1) if name in config}
    options = config.get("options")
    if isinstance(options, dict):
        deployed |= {name: options[name] for name in OPTIONS_1.get(str(config.get("defense")), ()) if name in options}
    if config.get("defense") == "patchguard" and isinstance(masks := deployed.pop("masks", None), dict):
        deployed |= {"covers": masks.get("covers")}
    if "labels" in deployed:
        deployed["prediction_dtype"] = deployed.pop("labels")
    beside = {name: value for name, value in config.items() if name not in (*deployed, *TOP_ENTRIES_1, "format", "options")}
    return {"format": FORMAT, "deployed": deployed, **beside}


def save_defense(
    folder: Path, defense: Defense, config: Mapping[str, Any], *, stored: str = "float32", shard_bytes: int = SHARD_BYTES
) -> None:
    """Write ``config.json`` and ``model.safetensors``, or several files and their index if they exceed ``shard_bytes``.

    Weights that are numbers of type ``stored`` take the space of this type.
    """
    write_json(folder / CONFIG, config)
    tensors = {name: _stored(tensor, getattr(torch, stored)) for name, tensor in defense.state_dict().items()}
    parts = _shards(tensors, shard_bytes)
    note = {"defense": config["deployed"]["defense"]}
    for number, part in enumerate(parts, 1):
        write_atomically(folder / (shard(number, len(parts)) if len(parts) > 1 else WEIGHTS), pack(part, note))
    if len(parts) > 1:
        held = {name: shard(number, len(parts)) for number, part in enumerate(parts, 1) for name in part}
        total = sum(tensor.nbytes for tensor in tensors.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": held})


def _shards(tensors: Mapping[str, Tensor], most: int) -> list[dict[str, Tensor]]:
    """The tensors in order, in as few parts of at most ``most`` bytes as that allows; a larger tensor is alone."""
    parts: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if parts[-1] and filled + tensor.nbytes > most:
            parts.append({})
            filled = 0
        parts[-1][name] = tensor
        filled += tensor.nbytes
    return parts


def _weights(folder: Path, names: Sequence[str], contents: Mapping[str, bytes]) -> dict[str, Tensor]:
    """All tensors of a folder. Of an index only the names of tensors count: the files are those that were hashed."""
    tensors: dict[str, Tensor] = {}
    parts = [name for name in names if name != INDEX]
    for name in parts:
        part, _ = unpack(folder / name, contents[name])
        twice = tensors.keys() & part.keys()
        if twice:
            raise IntegrityError(
                f"'{folder}' holds {min(twice)} in several files.", hint="Each tensor belongs in one file: save the model again."
            )
        tensors |= part
    if len(parts) > 1 and set(parse_json(contents[INDEX], folder / INDEX).get("weight_map", ())) != tensors.keys():
        raise IntegrityError(f"'{folder / INDEX}' lists other tensors than its files hold.", hint=RESTORE)
    return tensors


def _stored(tensor: Tensor, kind: torch.dtype) -> Tensor:
    """A tensor in fewer bits, if that does not change it."""
    short = tensor.to(kind) if tensor.is_floating_point() and tensor.ndim > 1 else tensor
    return short if torch.equal(short.to(tensor), tensor) else tensor


def load_defense(
    folder: Path, *, device: str = "cpu", expected_sha256: str | None = None, expected_config: str | None = None
) -> tuple[Defense, dict[str, Any]]:
    """Rebuild a defense from a folder: ``(defense in eval mode, configuration)``.

    Every file is read once: the bytes that are hashed are the bytes that are parsed.

    Args:
        folder: holds the configuration and the weights.
        device: where the defense is to be.
        expected_sha256: of the weights, see :func:`patchcert_cli.cards.weights_sha256`; None if unknown.
        expected_config: sha256 of the configuration; None if unknown.

    Raises:
        IntegrityError: a file is missing or damaged, a hash differs, or names or shapes of weights do not fit the configuration.
    """
    names = cards.weights_of(folder) if folder.is_dir() else []
    if not names:
        for candidate in sorted(folder.iterdir()) if folder.is_dir() else []:
            refuse_pickle(candidate)
        raise IntegrityError(f"'{folder}' holds no {WEIGHTS}.", hint="Give a folder that patchcert train or zoo pull made.")
    config = _configuration(folder / CONFIG, expected_config)
    contents = {name: files.read(folder / name) for name in names}
    _expect(folder / names[0], weights_sha256(contents), expected_sha256)
    tensors = _weights(folder, names, contents)
    del contents
    where = f"'{folder / CONFIG}' does not describe a defense"
    _check_size(config, sum(tensor.numel() for tensor in tensors.values()), where)
    try:
        defense = defenses.build(config["deployed"])
    except (KeyError, TypeError, ValueError, RuntimeError, MemoryError, OverflowError, RecursionError) as problem:
        raise IntegrityError(f"{where}: {' '.join(repr(problem).split())}.", hint=RESTORE) from problem
    check_fit(defense.state_dict(), tensors, f"'{folder / names[0]}' does not fit its {CONFIG}", hint=RESTORE)
    defense.load_state_dict(tensors, strict=True)  # half precision widens without a change
    defense = defense.to(torch.device(device)).eval()
    defense.test_once()
    return defense, config


def weights_sha256(contents: Mapping[str, bytes]) -> str:
    """The hash that stands for the weights in some files, from what they hold."""
    return cards.weights_sha256({name: cards.File(files.sha256_of(held), len(held)) for name, held in contents.items()})


def _expect(path: Path, actual: str, expected: str | None) -> None:
    if expected not in (None, actual):
        raise IntegrityError(
            f"{path}: sha256 {actual[:12]}… but its card says {str(expected)[:12]}….",
            hint="Fetch it again with: patchcert zoo pull NAME, or train it again.",
        )


def _configuration(path: Path, expected: str | None) -> dict[str, Any]:
    """A configuration whose sizes are plausible for a trained network."""
    content = files.read(path)
    _expect(path, files.sha256_of(content), expected)
    if len(content) > CONFIG_BYTES:
        raise IntegrityError(f"'{path}' has {len(content)} bytes.", hint=f"A configuration has at most {CONFIG_BYTES}.")
    config = upgraded(parse_json(content, path), path)
    deployed = config.get("deployed")
    problems = _implausible(deployed if isinstance(deployed, dict) else {})
    if problems:
        raise IntegrityError(
            f"'{path}' does not describe a defense: {'; '.join(problems)}.", hint="Fetch or train the model again."
        )
    return config


def _implausible(deployed: Mapping[str, Any], *, member: bool = False) -> list[str]:
    """What is wrong with the sizes in a section ``deployed``, and in those of the members of an ensemble."""
    shape, network, members, problems = deployed.get("input_shape"), deployed.get("network"), deployed.get("members"), []
    if not (isinstance(shape, list) and len(shape) == 3 and all(type(side) is int and 1 <= side <= SIDE for side in shape)):
        problems.append(f"input_shape is {shown(shape)}, not three whole numbers from 1 to {SIDE}")
    if members is not None and not member:
        whole = isinstance(members, list) and len(members) <= ENTRIES and all(isinstance(one, dict) for one in members)
        found = [_implausible(one, member=True) for one in members] if whole else [["members is not a short list of sections"]]
        return problems + [f"member {at}: {said}" if whole else said for at, each in enumerate(found, 1) for said in each]
    options = network.get("options") if isinstance(network, dict) else None
    if not isinstance(options, dict) or not isinstance(network, dict) or not isinstance(network.get("name"), str):
        problems.append("network is not a name and its options")
    for name, value in (options or {}).items() if isinstance(options, dict) else ():
        if isinstance(value, list) and len(value) > ENTRIES:
            problems.append(f"network option {name} has {len(value)} entries, and {ENTRIES} are allowed")
        values = value if isinstance(value, list) else [value]
        if any(isinstance(one, float) and not math.isfinite(one) for one in values):
            problems.append(f"network option {name} is {shown(value)}, which is not finite")
    return problems


def _check_size(config: Mapping[str, Any], held: int, where: str) -> None:
    """Raise unless the defense has room in its weights, before memory is taken for it: it is built without any first."""
    try:
        with torch.device("meta"):
            wanted = sum(weight.numel() for weight in defenses.build(config["deployed"]).parameters())
    except Exception:  # the error is reported when the network is built for use
        return
    if wanted > held + MODEST:  # fewer missing ones are reported by name later
        raise IntegrityError(
            f"{where} that fits its weights: its network has {wanted} numbers, and they are {held}.",
            hint=RESTORE,
        )


def weights_for(defense: Defense, folder: Path) -> dict[str, Tensor]:
    """The weights of a folder, for a defense that has such ones, to begin training with.

    The steps of grids (:class:`patchcert_cli.layers.fixed_point.Quantizer`) are fitted when training ends: they may be missing.

    Raises:
        UsageError: names, shapes or types are not those of the defense.
        IntegrityError: a file is missing or damaged.
    """
    names = cards.weights_of(folder)
    tensors = _weights(folder, names, {name: files.read(folder / name) for name in names})
    state = defense.state_dict()
    steps = [f"{name}.exponent" for name, layer in defense.named_modules() if isinstance(layer, Quantizer)]
    tensors = {name: state[name] for name in steps if name not in tensors} | tensors
    hint = "Train the network that has these weights: --recipe NAME, or its --network and --network-option."
    try:
        check_fit(state, tensors, f"the weights of '{folder.name}' are not those of the network that is to be trained", hint=hint)
    except IntegrityError as problem:  # the weights are intact: what was typed does not go together
        raise UsageError(problem.message, hint=hint) from problem
    return tensors


def check_fit(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], otherwise: str, *, hint: str) -> None:
    """Raise :class:`IntegrityError`, which begins with ``otherwise``, unless names, shapes and kinds of tensors agree."""
    problems = [f"missing {name}" for name in expected if name not in given]
    problems += [f"unexpected {name}" for name in given if name not in expected]
    problems += [
        f"{name} has shape {tuple(given[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in given and given[name].shape != tensor.shape
    ]
    problems += [
        f"{name} is {given[name].dtype}"
        for name, tensor in expected.items()
        if name in given and given[name].dtype not in (tensor.dtype, *(HALF if tensor.is_floating_point() else ()))
    ]
    if problems:
        more = f" and {len(problems) - MOST_SHOWN} more" if len(problems) > MOST_SHOWN else ""
        raise IntegrityError(f"{otherwise}: {'; '.join(problems[:MOST_SHOWN])}{more}.", hint=hint)


PREFIXES = ("module.", "_orig_mod.")  # of the names of weights saved from DataParallel and from compiled networks
COUNTER = "num_batches_tracked"  # of a batch norm: of no use in eval mode, and missing in old files


def renamed(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names of a network: without the prefixes of wrappers, and with its own counters where none are given."""
    found = dict(given)
    for _ in range(2 * len(PREFIXES)):
        for prefix in PREFIXES:
            strange = found.keys() - expected.keys()
            if strange and all(name.startswith(prefix) for name in found):
                found = {name.removeprefix(prefix): value for name, value in found.items()}
    counters = {name: value for name, value in expected.items() if name.rpartition(".")[2] == COUNTER and name not in found}
    return found | counters


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of names, kinds, shapes and values of tensors, which identifies weights that are in no file."""
    content = hashlib.sha256()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        content.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        content.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return content.hexdigest()
