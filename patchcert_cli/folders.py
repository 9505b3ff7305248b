"""Pictures in one folder per class, packed once into a flat file of 8-bit pixels that is mapped into memory and never read whole.

``FOLDER/CLASS/PICTURE``: classes are numbered in the order of their names, pictures in the order of classes, then names. Each
picture becomes a square as classifiers are usually tested on: its shorter side scaled to 256/224 of the square's, or as the
caller says (bicubic with antialiasing), then the middle cut out; colours only, as stored, without turning by EXIF.

The packed file lies in a store, a folder that the caller names, with a JSON beside it that says what it holds. It is made
again when the names, sizes or times of the pictures have changed. What is half done is kept, block by block.

Shapes: n pictures, S x S pixels.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from patchcert_cli import files
from patchcert_cli.errors import DataError, IntegrityError, Interrupted, MachineError
from patchcert_cli.progress import Progress, Silent

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
FORMAT = 1  # of packed files, with all that decides their pixels
SCALE = 256 / 224  # of the shorter side, to the side that is cut out
BLOCK = 512  # pictures between two points from which packing goes on after an interruption


@dataclass(frozen=True)
class Listing:
    """What is in a folder of class folders.

    Attributes:
        classes: names of the class folders, sorted.
        pictures: one text per picture, its path inside the folder, size and time, with zero characters between.
        labels: int64 [n].
    """

    folder: Path
    classes: tuple[str, ...]
    pictures: list[str]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.pictures)

    def path(self, number: int) -> Path:
        """Where picture ``number`` is."""
        return self.folder / self.pictures[number].split("\0", 1)[0]

    def digest(self, begin: int = 0, end: int | None = None) -> str:
        """sha256 of names, sizes and times of the pictures from ``begin`` to ``end``; contents are not read."""
        content = hashlib.sha256()
        for text in self.pictures[begin:end]:
            content.update(os.fsencode(text + "\n"))
        return content.hexdigest()


@dataclass(frozen=True)
class Packed:
    """A folder of class folders as tensors.

    Attributes:
        pixels: uint8 [n, 3, S, S], mapped from ``path``, not to be written to.
        labels: int64 [n].
        classes: names of the class folders.
        sha256: of the pixels, from when they were packed.
    """

    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    sha256: str
    path: Path


def class_names(folder: Path) -> tuple[str, ...]:
    """The names of the class folders of ``folder``, sorted; class i is the i-th.

    Raises:
        DataError: there is no such folder, or it has none.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder '{folder}'.")
    with _readable(folder), os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())
    if not names:
        raise DataError(
            f"'{folder}' has no class folders;", hint="put the pictures of each class into a sub-folder of their own."
        )
    return tuple(names)


def scan(folder: Path) -> Listing:
    """List a folder of class folders without opening a picture.

    Raises:
        DataError: there is no such folder, or it has no class folders, or one of them has no pictures.
    """
    classes, pictures, counts = class_names(folder), [], []
    for name in classes:
        with _readable(folder / name), os.scandir(folder / name) as entries:
            wanted = [one for one in entries if not one.name.startswith(".") and one.name.lower().endswith(PICTURES)]
            found = sorted((one.name, one.stat()) for one in wanted if not one.is_dir())
        if not found:
            raise DataError(
                f"'{folder / name}' has no pictures ({', '.join(PICTURES)});",
                hint="every class folder needs some: add, or remove it.",
            )
        pictures += [f"{name}/{one}\0{facts.st_size}\0{facts.st_mtime_ns}" for one, facts in found]
        counts.append(len(found))
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor(counts))
    return Listing(folder, classes, pictures, labels)


def shorter(size: int) -> int:
    """The usual length of a picture's shorter side before a square of ``size`` pixels is cut out of its middle."""
    return round(size * SCALE)


def load(
    folder: Path, size: int, short: int | None = None, *, stores: Sequence[Path], progress: Progress | None = None
) -> Packed:
    """The pictures of ``folder`` as squares of ``size`` pixels, packed if they are not yet.

    Args:
        folder: holds a folder per class.
        size: S, of the squares.
        short: what the shorter side of a picture is scaled to before, :func:`shorter` by default.
        stores: looked through for the packed file; it is made in the first of them that can be written to.
        progress: is told how far it is packed.

    Raises:
        DataError: the folder is not one of class folders with pictures, or a picture cannot be read.
        MachineError: the disk is too small, or another process is packing the same folder.
        Interrupted: stopped by Ctrl-C; the same call goes on where it stopped.
    """
    listing, short = scan(folder), short or shorter(size)
    found = find(listing, size, short, stores=stores)
    if found is not None:
        return found
    wanted = _wanted(listing, size, short)
    place = _place(_writable(stores), folder, size, short)
    with _alone(place):
        found = _opened(place, listing, wanted)  # another process may have been quicker
        if found is None:
            _pack(listing, wanted, place, progress or Silent())
            found = _opened(place, listing, wanted)
    if found is None:
        raise MachineError(f"'{place}' vanished while it was made;", hint="run the same command again.")
    return found


def find(listing: Listing, size: int, short: int, *, stores: Sequence[Path]) -> Packed | None:
    """The packed file of these pictures, if there is one that holds them as they are now; see :func:`load`."""
    wanted = _wanted(listing, size, short)
    places = (_place(store, listing.folder, size, short) for store in stores)
    return next((found for place in places if (found := _opened(place, listing, wanted)) is not None), None)


def glance(listing: Listing, numbers: Sequence[int], size: int, short: int) -> Tensor:
    """Some pictures of a listing as uint8 [m, 3, S, S], read from their own files."""
    squares = b"".join(square(listing.path(number), size, short) for number in numbers)
    return torch.frombuffer(bytearray(squares), dtype=torch.uint8).reshape(len(numbers), 3, size, size)


def square(path: Path, size: int, short: int | None = None) -> bytes:
    """One picture as the bytes of uint8 [3, S, S]; ``short`` is the length of its shorter side before, see :func:`shorter`.

    Raises:
        DataError: it cannot be read, or has more than 8 bits.
    """
    from PIL import Image

    try:
        with Image.open(path) as opened:
            deep = opened.mode.startswith(("I", "F"))
            clear = "transparency" in opened.info
            picture: Any = (opened.convert("RGBA") if clear else opened).convert("RGB")
    except Exception as problem:  # damaged files raise nearly anything
        raise DataError(
            f"'{path}' is not a picture that can be read ({type(problem).__name__}).",
            hint="Replace or remove it, then run the same command again: what is packed is kept.",
        ) from problem
    if deep:
        raise DataError(f"'{path}' has more than 8 bits per channel;", hint="save it as 8-bit PNG or JPEG.")
    short = short or shorter(size)
    width, height = picture.size
    wide, high = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
    left, top = round((wide - size) / 2), round((high - size) / 2)
    picture = picture.resize((wide, high), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    return numpy.asarray(picture).transpose(2, 0, 1).tobytes()


def _wanted(listing: Listing, size: int, short: int) -> dict[str, Any]:
    """What a packed file must say of itself to hold these pictures."""
    said = {"format": FORMAT, "size": size, "pictures": len(listing), "listing": listing.digest()}
    return said if short == shorter(size) else {**said, "short": short}


def _place(store: Path, folder: Path, size: int, short: int) -> Path:
    """Where the packed file of ``folder`` is in ``store``. A data directory can be moved as a whole with the store inside."""
    whole, home = folder.resolve(), store.resolve().parent
    key = whole.relative_to(home) if whole.is_relative_to(home) else whole
    name = "-".join(key.relative_to(key.anchor).parts[-2:])
    sides = f"{size}" if short == shorter(size) else f"{size}of{short}"
    return store / f"{name}-{sides}-{files.sha256_of(os.fsencode(key.as_posix()))[:8]}.u8"


def _writable(stores: Sequence[Path]) -> Path:
    for store in stores:
        with contextlib.suppress(OSError):
            store.mkdir(parents=True, exist_ok=True)
            if os.access(store, os.W_OK):
                return store
    raise MachineError(
        f"cannot write to {' or '.join(map(repr, map(str, stores)))};", hint="the packed pictures must lie somewhere."
    )


def _opened(place: Path, listing: Listing, wanted: dict[str, Any]) -> Packed | None:
    """The packed file, or None if it is not there, not whole or not of these pictures."""
    try:
        facts = files.read_json(place.with_suffix(".json"))
        there = place.stat().st_size
    except (IntegrityError, OSError):
        return None
    shape = (wanted["pictures"], 3, wanted["size"], wanted["size"])
    if there != math.prod(shape) or any(facts.get(key) != value for key, value in wanted.items()):
        return None
    # not torch.from_file: it maps a file copy-on-write, which Linux refuses beyond the size of the memory, or open for writing
    flat = numpy.memmap(place, dtype=numpy.uint8, mode="r", shape=shape)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nobody writes to a data set
        pixels = torch.from_numpy(flat)
    return Packed(pixels, listing.labels, listing.classes, str(facts["sha256"]), place)


def _pack(listing: Listing, wanted: dict[str, Any], place: Path, progress: Progress) -> None:
    """Write the packed file and the JSON beside it; it is complete as soon as it has its name."""
    size, total = int(wanted["size"]), len(listing)
    short = int(wanted.get("short", shorter(size)))
    bytes_each = 3 * size * size
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
        with partial.open("ab") as stream, ThreadPoolExecutor(torch.get_num_threads()) as pool:
            stream.truncate(done * bytes_each)
            while done < total:
                end = min(done + BLOCK, total)
                paths = [listing.path(number) for number in range(done, end)]
                content = b"".join(pool.map(square, paths, [size] * len(paths), [short] * len(paths)))
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())  # before the journal says so
                blocks.append([listing.digest(done, end), files.sha256_of(content)])
                files.write_json(journal, {"format": FORMAT, "size": size, "blocks": blocks})
                done = end
                progress.update(done, total, "packing pictures")
        whole = files.sha256_of("".join(content for _, content in blocks).encode())
        files.write_json(place.with_suffix(".json"), {**wanted, "sha256": whole, **_described(listing)})
        os.replace(partial, place)  # last: until then the next call finishes this
    except OSError as problem:
        raise MachineError(
            f"cannot write '{partial}': {problem.strerror or problem};",
            hint=f"run the same command again: {done} pictures are kept.",
        ) from problem
    except KeyboardInterrupt as problem:
        raise Interrupted(f"interrupted at {done} of {total} pictures;", hint="resume with the same command.") from problem
    journal.unlink(missing_ok=True)


def _described(listing: Listing) -> dict[str, Any]:
    """What nobody needs to read the packed file, but to know what it is; decoders differ between versions."""
    import PIL

    return {"folder": str(listing.folder), "classes": list(listing.classes), "pillow": PIL.__version__}


def _kept(listing: Listing, wanted: dict[str, Any], partial: Path, journal: Path, bytes_each: int) -> list[list[str]]:
    """The first blocks of an interrupted packing that hold the very pictures of ``listing``."""
    try:
        before, there = files.read_json(journal), partial.stat().st_size
        blocks = [[str(of), str(content)] for of, content in before["blocks"]]
    except (IntegrityError, OSError, KeyError, TypeError, ValueError):
        return []
    kept: list[list[str]] = []
    if (before.get("format"), before.get("size")) == (wanted["format"], wanted["size"]):
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
            f"{what} needs {need / 1e9:.1f} GB in '{place.parent}', where {free / 1e9:.1f} GB are free;",
            hint="free some space, or make that folder a link to a larger disk.",
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
                f"another process is packing '{place}';", hint="wait until it is done, then run the same command again."
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


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        raise DataError(f"'{problem.filename or folder}' cannot be read: {problem.strerror or problem}.") from problem
