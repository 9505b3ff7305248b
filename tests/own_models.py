"""What somebody brings along, in small: pictures in class folders, and a module with networks of their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"cat": 40, "dog": 130, "red_fox": 220}  # mean brightness of a class, which its network tells
MODULE = '''
import torch
from torch import nn


class Brightness(nn.Module):
    """Tells three classes by how bright a picture is."""

    mean, std, size = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), 16

    def __init__(self, names=None):
        super().__init__()
        self.centre = nn.Parameter(torch.tensor([COLOURS]) / 255)
        if names:
            self.classes = names

    def forward(self, x):
        return -40 * (x.mean(dim=(1, 2, 3))[:, None] * 0.25 + 0.5 - self.centre).abs()


class Returns(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.what, self.weight = what, nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.what(x)


def build(): return Brightness()
def named(): return Brightness(["cat", "dog", "red fox"])
def turned(): return Brightness(["dog", "cat", "red fox"])
def raw(): return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
def broken(): return Returns(lambda x: torch.full((len(x), 3), float("nan")))
def maps(): return nn.Conv2d(3, 3, 1)
def pairs(): return Returns(lambda x: (x, x))
def fails(): return Returns(lambda x: x.reshape(7, 7))
def quits(): return Returns(lambda x: exit(0))
def raises(): raise ValueError("no luck\\nat all")
def number(): return 3
def sizes():
    made = Brightness()
    made.size = (1, 2, 3)
    return made
def half():
    made = Brightness()
    made.std = None
    return made
'''.replace("COLOURS", ", ".join(map(str, COLOURS.values())))


def pictures(folder: Path, each: int = 4, names: dict[str, int] | None = None) -> Path:
    """Class folders of noisy grey pictures, a class as bright as :data:`COLOURS` says."""
    for seed, (name, level) in enumerate((names or COLOURS).items()):
        (folder / name).mkdir(parents=True)
        for one in range(each):
            draw = np.random.default_rng(100 * seed + one)
            noise = draw.integers(-20, 21, (24 + one, 30 - one, 3)) + level
            Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(folder / name / f"{one}.png")
    return folder


def module(folder: Path, name: str) -> str:
    """Write the module under this name, which is its address before the colon."""
    (folder / f"{name}.py").write_text(MODULE, encoding="utf-8")
    return name


def lines(path: Path, *names: str) -> Path:
    """A text file with one name per line."""
    path.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    return path
