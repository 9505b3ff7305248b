"""Pictures in one folder per class, packed once into a flat file of 8-bit pixels that is mapped into memory and never read whole.

Which pictures a folder has says :mod:`patchcert_cli.data.class_folders`, what they become :mod:`patchcert_cli.data.image_files`.

The packed file lies in a store, a folder that the caller names, with a JSON beside it that says what it holds. It is made
again when the names, sizes or times of the pictures have changed. What is half done is kept, block by block.

Shapes: n pictures, H x W pixels.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy
import torch
from torch import Tensor

from patchcert_cli.data import image_files
from patchcert_cli.data.class_folders import SHOWN, ClassFolders, scan, skipped_text
from patchcert_cli.data.image_files import ImageChanges
from patchcert_cli.data.resize_crop import ResizeCrop
from patchcert_cli.errors import DataError, IntegrityError, Interrupted, MachineError
from patchcert_cli.progress import Progress, Silent
from patchcert_cli.storage import files

FORMAT = 2  # of packed files, with all that decides their pixels
REMEDY, AGAIN = "Replace or remove", "then run the same command again: what is packed is kept."
BLOCK = 512  # pictures between two points from which packing goes on after an interruption


@dataclass(frozen=True)
class Packed:
    """A folder of class folders as tensors.

    Attributes:
        pixels: uint8 [n, 3, H, W], mapped from ``path``, not to be written to.
        labels: int64 [n].
        classes: names of the class folders.
        sha256: of the pixels, from when they were packed.
        remarks: what was done to the pictures, and what was skipped, a line each.
        files: the path of each picture inside the folder.
    """

    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    sha256: str
    path: Path
    remarks: tuple[str, ...] = ()
    files: tuple[str, ...] = ()


def load(folder: Path, resize_crop: ResizeCrop, *, stores: Sequence[Path], progress: Progress | None = None) -> Packed:
    """The pictures of ``folder`` as images, packed if they are not yet.

    Args:
        folder: holds a folder per class.
        resize_crop: how a picture becomes an image [3, H, W].
        stores: looked through for the packed file; it is made in the first of them that can be written to.
        progress: is told how far it is packed, and which pictures are damaged.

    Raises:
        DataError: the folder is not one of class folders with pictures, or pictures cannot be read: all of them are named.
        MachineError: the disk is too small, or another process is packing the same folder.
        Interrupted: stopped by Ctrl-C; the same call goes on where it stopped.
    """
    listing = scan(folder)
    found = find(listing, resize_crop, stores=stores)
    if found is not None:
        return found
    wanted = _wanted(listing, resize_crop)
    place = _place(_writable(stores), folder, resize_crop)
    with _alone(place):
        found = _opened(place, listing, wanted, resize_crop)  # another process may have been quicker
        if found is None:
            _pack(listing, wanted, resize_crop, place, progress or Silent())
            found = _opened(place, listing, wanted, resize_crop)
    if found is None:
        raise MachineError(f"'{place}' vanished while it was made.", hint="Run the same command again.")
    return found


def find(listing: ClassFolders, resize_crop: ResizeCrop, *, stores: Sequence[Path]) -> Packed | None:
    """The packed file of these pictures, if there is one that holds them as they are now; see :func:`load`."""
    wanted = _wanted(listing, resize_crop)
    places = (_place(store, listing.folder, resize_crop) for store in stores)
    return next((found for place in places if (found := _opened(place, listing, wanted, resize_crop)) is not None), None)


def glance(listing: ClassFolders, numbers: Sequence[int], resize_crop: ResizeCrop) -> tuple[Tensor, tuple[str, ...]]:
    """Some pictures of a listing as uint8 [m, 3, H, W], read from their own files, and remarks as of :class:`Packed`."""
    with image_files.without_warnings():
        found = [image_files.decode(listing.path(number), resize_crop) for number in numbers]
    account = sum(map(ImageChanges.of, found), ImageChanges())
    return torch.stack([one.pixels for one in found]), _remarks(account, listing, resize_crop)


def _remarks(account: ImageChanges, listing: ClassFolders, resize_crop: ResizeCrop) -> tuple[str, ...]:
    skipped = skipped_text(listing.skipped).removeprefix("; ")
    return (*account.lines(resize_crop), *([f"{skipped} in '{listing.folder}'"] if skipped else []))


def _wanted(listing: ClassFolders, resize_crop: ResizeCrop) -> dict[str, Any]:
    """What a packed file must say of itself to hold these pictures."""
    return {"format": FORMAT, "resize_crop": str(resize_crop), "pictures": len(listing), "listing": listing.digest()}


def _place(store: Path, folder: Path, resize_crop: ResizeCrop) -> Path:
    """Where the packed file of ``folder`` is in ``store``. A data directory can be moved as a whole with the store inside."""
    whole, home = folder.resolve(), store.resolve().parent
    key = whole.relative_to(home) if whole.is_relative_to(home) else whole
    name = "-".join(key.relative_to(key.anchor).parts[-2:])
    sides = str(resize_crop).replace("/", "of").replace(",", "-")
    return store / f"{name}-{sides}-{files.sha256_of(os.fsencode(key.as_posix()))[:8]}.u8"


def _writable(stores: Sequence[Path]) -> Path:
    for store in stores:
        with contextlib.suppress(OSError):
            store.mkdir(parents=True, exist_ok=True)
            if os.access(store, os.W_OK):
                return store
    raise MachineError(
        f"cannot write to {' or '.join(map(repr, map(str, stores)))}.",
        hint="Set --data-dir or HF_HOME to a folder that can be written.",
    )


def _opened(place: Path, listing: ClassFolders, wanted: dict[str, Any], resize_crop: ResizeCrop) -> Packed | None:
    """The packed file, or None if it is not there, not whole or not of these pictures."""
    try:
        facts = files.read_json(place.with_suffix(".json"))
        there, account = place.stat().st_size, ImageChanges.from_list(facts["account"])
    except (IntegrityError, OSError, KeyError, TypeError, ValueError):
        return None
    shape = (wanted["pictures"], 3, *resize_crop.size)
    if there != math.prod(shape) or any(facts.get(key) != value for key, value in wanted.items()):
        return None
    # not torch.from_file: it maps a file copy-on-write, which Linux refuses beyond the size of the memory, or open for writing
    flat = numpy.memmap(place, dtype=numpy.uint8, mode="r", shape=shape)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nobody writes to a data set
        pixels = torch.from_numpy(flat)
    remarks = _remarks(account, listing, resize_crop)
    return Packed(pixels, listing.labels, listing.classes, str(facts["sha256"]), place, remarks, listing.files)


def _pack(listing: ClassFolders, wanted: dict[str, Any], resize_crop: ResizeCrop, place: Path, progress: Progress) -> None:
    """Write the packed file and the JSON beside it; it is complete as soon as it has its name."""
    total, bytes_each = len(listing), 3 * math.prod(resize_crop.size)
    for stale in (place.with_suffix(".json"), place):  # of other pictures; whoever has it mapped keeps it
        stale.unlink(missing_ok=True)
    partial, journal = place.with_suffix(".partial"), place.with_suffix(".partial.json")
    blocks = _kept(listing, wanted, partial, journal, bytes_each)
    done = min(len(blocks) * BLOCK, total)
    _check_room(place, (total - done) * bytes_each, f"packing {total} pictures of '{listing.folder}'")
    progress.note(f"packing {total} pictures of '{listing.folder}' into '{place}' ({total * bytes_each / 1e9:.1f} GB), once")
    if done:
        progress.note(f"{done} of them are packed already")
    try:
        with partial.open("ab") as stream, ThreadPoolExecutor(torch.get_num_threads()) as pool, image_files.without_warnings():
            stream.truncate(done * bytes_each)
            while done < total:
                end = min(done + BLOCK, total)
                found = list(pool.map(_tried, map(listing.path, range(done, end)), [resize_crop] * (end - done)))
                taken = [one for one in found if isinstance(one, image_files.DecodedImage)]
                if len(taken) < len(found):  # nothing more is packed: all damaged pictures are told at once
                    _refuse([one for one in found if isinstance(one, DataError)], listing, end, pool, resize_crop, progress)
                content = b"".join(one.pixels.numpy().tobytes() for one in taken)
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())  # before the journal says so
                account = sum(map(ImageChanges.of, taken), ImageChanges())
                blocks.append([listing.digest(done, end), files.sha256_of(content), account.to_list()])
                files.write_json(journal, {**_same(wanted), "blocks": blocks})
                done = end
                progress.update(done, total, "packing pictures")
        whole = files.sha256_of("".join(content for _, content, _ in blocks).encode())
        account = sum((ImageChanges.from_list(said) for _, _, said in blocks), ImageChanges())
        facts = {**wanted, "sha256": whole, "account": account.to_list(), **_described(listing)}
        files.write_json(place.with_suffix(".json"), facts)
        os.replace(partial, place)  # last: until then the next call finishes this
    except OSError as problem:
        raise MachineError(
            f"cannot write '{partial}': {problem.strerror or problem}.",
            hint=f"Run the same command again: {done} pictures are kept.",
        ) from problem
    except KeyboardInterrupt as problem:
        raise Interrupted(f"interrupted at {done} of {total} pictures.", hint="Resume with the same command.") from problem
    journal.unlink(missing_ok=True)


def _tried(path: Path, resize_crop: ResizeCrop) -> image_files.DecodedImage | DataError:
    try:
        return image_files.decode(path, resize_crop)
    except DataError as problem:
        return problem


def _refuse(
    bad: list[DataError], listing: ClassFolders, begin: int, pool: ThreadPoolExecutor, resize_crop: ResizeCrop, progress: Progress
) -> NoReturn:
    """Raise for all pictures that cannot be read, after looking at those from ``begin`` on too."""
    total = len(listing)
    for at in range(begin, total, BLOCK):
        paths = [listing.path(number) for number in range(at, min(at + BLOCK, total))]
        bad += [one for one in pool.map(_tried, paths, [resize_crop] * len(paths)) if isinstance(one, DataError)]
        progress.update(min(at + BLOCK, total), total, f"looking for damaged pictures, {len(bad)} so far")
    said = [one.message for one in bad]
    if len(bad) == 1:
        raise DataError(said[0], hint=f"{REMEDY} it, {AGAIN}") from bad[0]
    for one in said:
        progress.note(one)
    named = " ".join(said[:SHOWN]) + (f" And {len(bad) - SHOWN} more." if len(bad) > SHOWN else "")
    raise DataError(f"{len(bad)} of {total} pictures cannot be used. {named}", hint=f"{REMEDY} them, {AGAIN}") from bad[0]


def _described(listing: ClassFolders) -> dict[str, Any]:
    """What nobody needs to read the packed file, but to know what it is; decoders differ between versions."""
    import PIL

    return {"folder": str(listing.folder), "classes": list(listing.classes), "pillow": PIL.__version__}


def _same(wanted: dict[str, Any]) -> dict[str, Any]:
    """What decides the pixels of a picture."""
    return {key: wanted[key] for key in ("format", "resize_crop")}


def _kept(listing: ClassFolders, wanted: dict[str, Any], partial: Path, journal: Path, bytes_each: int) -> list[list[Any]]:
    """The first blocks of an interrupted packing that hold the very pictures of ``listing``."""
    try:
        before, there = files.read_json(journal), partial.stat().st_size
        blocks = [[str(of), str(content), ImageChanges.from_list(said).to_list()] for of, content, said in before["blocks"]]
    except (IntegrityError, OSError, KeyError, TypeError, ValueError):
        return []
    kept: list[list[Any]] = []
    if {key: before.get(key) for key in _same(wanted)} == _same(wanted):
        for begin, block in zip(range(0, len(listing), BLOCK), blocks, strict=False):
            end = min(begin + BLOCK, len(listing))
            if end * bytes_each > there or block[0] != listing.digest(begin, end):
                break
            kept.append(block)
    return kept


def _check_room(place: Path, need: int, what: str) -> None:
    free = shutil.disk_usage(place.parent).free
    if need > free:
        raise MachineError(
            f"{what} needs {need / 1e9:.1f} GB in '{place.parent}', where {free / 1e9:.1f} GB are free.",
            hint="Free some space, or make that folder a link to a larger disk.",
        )


@contextlib.contextmanager
def _alone(place: Path) -> Iterator[None]:
    """Keep other processes from packing the same; the lock ends with the process, however it ends."""
    try:
        lock = place.with_suffix(".lock").open("w")
    except OSError as problem:
        raise MachineError(f"cannot write to '{place.parent}': {problem.strerror or problem}.") from problem
    with lock:
        if not _locked(lock.fileno()):
            raise MachineError(
                f"another process is packing '{place}'.", hint="Wait until it is done, then run the same command again."
            )
        yield


def _locked(descriptor: int) -> bool:
    """Whether no other process holds the lock; nobody is kept out where the system or the disk knows no locks."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return True
    return True
