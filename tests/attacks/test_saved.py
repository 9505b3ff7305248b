"""Given pictures are pasted anywhere within the threat, each pasting is counted, and no certificate breaks."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from torch import Tensor

from patchcert_cli import attacks
from patchcert_cli.attacks.saved import Picture, SavedPatches, read, turned
from patchcert_cli.certificate import ALERT
from patchcert_cli.defenses import Defense
from patchcert_cli.defenses.ibp.defense import IntervalDefense
from patchcert_cli.defenses.minority import Minority
from patchcert_cli.defenses.patchcleanser import PatchCleanser
from patchcert_cli.errors import DataError, UnsupportedThreat, UsageError
from patchcert_cli.threats import Patch, Sparse, parse_threat
from tests.examples import tiny


def picture(height: int, width: int, value: float = 1.0, channels: int = 1) -> Picture:
    return Picture(f"{height}x{width}.png", torch.full((channels, height, width), value), "0" * 64)


def save(path: Path, pixels: Tensor) -> None:
    Image.fromarray(numpy.asarray((pixels * 255).round().byte().permute(1, 2, 0).squeeze(2))).save(path)


def made(kind: type[Defense], seed: int = 3) -> Defense:
    return tiny({PatchCleanser: "patchcleanser", Minority: "minority", IntervalDefense: "ibp"}[kind], seed)


@pytest.mark.parametrize("kind", [PatchCleanser, Minority, IntervalDefense])
def test_every_pasting_is_counted_as_a_loop_over_all_places_counts_it(kind: type[Defense]) -> None:
    defense, threat = made(kind), Patch(2, 3)
    x = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    attack = SavedPatches(pictures=(picture(2, 3), picture(2, 2, 0.0), picture(1, 3, 0.7)), places=20)
    found = attack(defense, x, threat)
    assert found.judged[:, 0].tolist() == [60] * 6
    clean = defense.predict(x)
    plain = defense.plain(x)
    assert torch.equal(found.plain, clean if plain is None else plain)
    for at in range(len(x)):
        outcomes = []
        for one in attack.pictures:
            height, width = one.pixels.shape[1:]
            for top in range(4 - height + 1):
                for left in range(4 - width + 1):
                    changed = x[at].clone()
                    changed[:, top : top + height, left : left + width] = one.pixels
                    outcomes.append(int(defense.predict(changed[None])[0]))
        kept = {int(clean[at]), *([ALERT] if kind is Minority else [])}
        can = any(answer not in kept for answer in outcomes) and int(clean[at]) != ALERT
        assert bool(found.success[at]) == bool(found.judged[at, 1]) == can  # 20 places each meet all there are
    assert int(found.judged[:, 1].sum()) > 0 or kind is not IntervalDefense


def test_pastings_stay_within_the_threat_and_reach_every_place() -> None:
    seen: set[tuple[int, int]] = set()
    image, most = torch.zeros(1, 6, 7), Patch(2, 3)
    attack = SavedPatches(pictures=(picture(2, 3),), places=300)
    for lots in attack.draw(torch.tensor([5]), 0, 1200).reshape(300, 4).double().tolist():
        changed = attack._pasted(image, attack.pictures[0].pixels, most, lots) != 0
        assert int(changed.sum()) == 6 and bool(most.contains(changed[None])[0])
        seen.add(tuple(changed[0].nonzero()[0].tolist()))  # type: ignore[arg-type]
    assert len(seen) == 5 * 5


@pytest.mark.parametrize("most", [Patch(9, 9), Patch(8, 14)])
def test_a_turned_and_scaled_picture_fits_the_threat(most: Patch) -> None:
    content = torch.rand(3, 8, 9, generator=torch.Generator().manual_seed(0))
    for step in range(-18, 19):
        for scale in (1.0, 0.7, 0.05):
            box, inside = turned(content, math.radians(10 * step), scale, most)
            assert box.shape[1:] == inside.shape and inside.any()
            assert inside.shape[0] <= most.height and inside.shape[1] <= most.width
            assert float(box.min()) >= 0 and float(box.max()) <= 1


@pytest.mark.parametrize(("degrees", "turns"), [(90, 1), (180, 2), (-90, -1)])
def test_quarter_turns_are_exact(degrees: int, turns: int) -> None:
    content = torch.rand(3, 8, 5, generator=torch.Generator().manual_seed(0))
    box, inside = turned(content, math.radians(degrees), 1.0, Patch(8, 8))
    assert inside.all()
    torch.testing.assert_close(box, torch.rot90(content, turns, (1, 2)), atol=1e-5, rtol=0)


def test_what_is_drawn_depends_on_seed_and_number_alone() -> None:
    defense, x = made(PatchCleanser), torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    attack = SavedPatches(pictures=(picture(2, 3),), places=3, turn=30, shrink=0.5)
    whole, threat = attack(defense, x, Patch(2, 3)), Patch(2, 3)
    parts = [attack(defense, x[at : at + 1], threat, index=torch.tensor([at])) for at in range(4)]
    assert torch.equal(torch.cat([part.judged for part in parts]), whole.judged)
    other = SavedPatches(pictures=attack.pictures, places=3, turn=30, shrink=0.5, seed=1)
    assert not torch.equal(other.draw(torch.arange(4), 0, 4), attack.draw(torch.arange(4), 0, 4))


@pytest.mark.parametrize("kind", [PatchCleanser, Minority])
def test_no_certified_answer_changes(kind: type[Defense]) -> None:
    x = torch.rand(16, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    attack = SavedPatches(pictures=tuple(picture(2, 3, value) for value in (0.0, 0.3, 1.0)), places=2, turn=180)
    proven = 0
    for seed in range(2):
        defense = made(kind, seed)
        certified = defense.certify(x, Patch(2, 3)).certified
        assert not bool((attack(defense, x, Patch(2, 3)).success & certified).any())
        proven += int(certified.sum())
    assert proven > 0


def test_pictures_are_read_by_name_with_the_channels_of_the_images(tmp_path: Path) -> None:
    pixels = torch.rand(3, 5, 4, generator=torch.Generator().manual_seed(0))
    save(tmp_path / "b.png", pixels)
    save(tmp_path / "a.png", pixels[:, :2])
    (tmp_path / "patches.json").write_text("{}")
    found = read(tmp_path, 3)
    assert [one.name for one in found] == ["a.png", "b.png"]
    torch.testing.assert_close(found[1].pixels, (pixels * 255).round() / 255)
    assert read(tmp_path, 1)[0].pixels.shape == (1, 2, 4)
    attack, named = attacks.pasted(tmp_path, parse_threat("patch:50%"), (3, 8, 8), seed=2, places=2)
    assert isinstance(attack, SavedPatches) and (attack.seed, attack.places) == (2, 2)
    assert list(named) == ["a.png", "b.png"] and named["a.png"] == found[0].sha256


Spoil = Callable[[Path], object]


@pytest.mark.parametrize(
    ("spoil", "threat", "error", "message"),
    [
        (lambda folder: folder.rmdir(), "patch:5x5", DataError, r"there is no folder .*--saved"),
        (lambda folder: None, "patch:5x5", DataError, "has no image files. Put"),
        (lambda folder: (folder / "a.png").write_bytes(b"<html>"), "patch:5x5", DataError, r"a\.png.*image"),
        (lambda folder: save(folder / "a.png", torch.zeros(3, 6, 5)), "patch:5x5", UsageError, r"a\.png is 6x5, larger than"),
        (lambda folder: save(folder / "a.png", torch.zeros(3, 5, 5)), "sparse:3", UnsupportedThreat, r"cannot be pasted under"),
    ],
)
def test_what_cannot_be_pasted_is_told_in_one_line(
    tmp_path: Path, spoil: Spoil, threat: str, error: type[Exception], message: str
) -> None:
    folder = tmp_path / "patches"
    folder.mkdir()
    spoil(folder)
    with pytest.raises(error, match=message) as caught:
        attacks.pasted(folder, parse_threat(threat), (3, 8, 8))
    assert "\n" not in str(caught.value)


def test_bad_options_and_other_channels_are_refused() -> None:
    for options, words in (({"places": 0}, "places 0"), ({"turn": 200.0}, "turn 200"), ({"shrink": 0.0}, "shrink 0")):
        with pytest.raises(UsageError, match=words):
            SavedPatches(**options)  # type: ignore[arg-type]
    defense, x = made(PatchCleanser), torch.zeros(1, 1, 4, 4)
    with pytest.raises(UsageError, match="no image files to paste"):
        SavedPatches()(defense, x, Patch(2, 3))
    with pytest.raises(UsageError, match="3 channels, the images have 1"):
        SavedPatches(pictures=(picture(2, 2, channels=3),))(defense, x, Patch(2, 3))
    with pytest.raises(UsageError, match="cannot attack under"):
        SavedPatches(pictures=(picture(2, 2),))(defense, x, Sparse(2))
