"""What a drawn picture of the shapes world shows, told without a model: every cell against the world's own drawing of every class in it.

Letters: P pictures, G cells a side, c pixels a cell.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mmfast.data.synthetic import COLOURS, World

GROUND = 230  # the middle of the grounds that scenes have


@dataclass(frozen=True)
class Seen:
    """An object in a cell."""

    colour: int
    shape: int
    row: int
    col: int


class Reader:
    """The nearest, by squared error, of all that a cell can hold: nothing, or each class at each of its sizes and places within the cell."""

    def __init__(self, world: World):
        self.world, c = world, world.config
        cover = world.sprites.reshape(c.shapes, -1, c.cell, c.cell, 1) / 16  # [shapes, variants, c, c, 1]
        inks = np.array([rgb for _, rgb in COLOURS[: c.colours]], np.float32).reshape(-1, 1, 1, 1, 1, 3)
        drawn = GROUND * (1 - cover) + inks * cover  # [colours, shapes, variants, c, c, 3]
        empty = np.full((1, c.cell * c.cell * 3), GROUND, np.float32)
        self._forms = np.concatenate([empty, drawn.reshape(-1, empty.shape[1]).astype(np.float32)])
        self._class = np.concatenate([[-1], np.repeat(np.arange(c.classes), cover.shape[1])])

    def __call__(self, pictures: np.ndarray) -> list[list[Seen]]:
        """uint8 ``[P, pixels, pixels, 3]`` -> the objects of each picture, cell after cell."""
        c = self.world.config
        size = c.pixels
        if pictures.shape[1:] != (size, size, 3):
            raise ValueError(f"Reader: expected pictures [P, {size}, {size}, 3], got {list(pictures.shape)}")
        cells = pictures.reshape(-1, c.grid, c.cell, c.grid, c.cell, 3).transpose(0, 1, 3, 2, 4, 5).astype(np.float32)
        # A scene's ground is one level of grey; most of a picture is ground.
        cells = cells + (GROUND - np.median(pictures, (1, 2, 3)).astype(np.float32))[:, None, None, None, None, None]
        rows = cells.reshape(-1, self._forms.shape[1])
        error = (self._forms**2).sum(1) - 2 * rows @ self._forms.T  # the cell's own square is the same for all
        found = self._class[error.argmin(1)].reshape(-1, c.grid, c.grid)
        return [[Seen(*divmod(int(k), c.shapes), row, col) for (row, col), k in np.ndenumerate(picture) if k >= 0] for picture in found]
