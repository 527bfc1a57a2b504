"""The reader of drawn scenes, on the world's own pictures, where the truth is known."""

import numpy as np
import pytest

from mmfast.data.synthetic import World, WorldConfig
from mmfast.eval.drawn import Reader


def read_and_true(world, scenes, pictures):
    found = [sorted((s.colour, s.shape, s.row, s.col) for s in seen) for seen in Reader(world)(pictures)]
    return found, [sorted((o.colour, o.shape, o.row, o.col) for o in scene.objects) for scene in scenes]


@pytest.mark.parametrize("config", [WorldConfig(seed=3), WorldConfig.large(seed=1)], ids=["small", "large"])
def test_true_pictures_are_read_without_a_fault(config):
    world = World(config)
    scenes = world.scenes("test", 100)
    found, true = read_and_true(world, scenes, world.render(scenes))
    assert found == true
    assert len({(c, s) for picture in true for c, s, *_ in picture}) > 20


def test_blurred_and_shifted_pictures_are_still_read():
    """A drawing is no rendering: soft edges and colours that are a little off."""
    world = World(WorldConfig(seed=0))
    scenes = world.scenes("test", 100)
    pictures = world.render(scenes).astype(np.float32)
    soft = (pictures + np.roll(pictures, 1, 1) + np.roll(pictures, 1, 2) + np.roll(pictures, (1, 1), (1, 2))) / 4
    noise = np.random.default_rng(0).normal(0, 15, soft.shape)
    found, true = read_and_true(world, scenes, np.clip(soft + noise, 0, 255).astype(np.uint8))
    assert sum(a == b for a, b in zip(found, true, strict=True)) >= 90


def test_nothing_is_seen_on_a_bare_ground():
    world = World()
    for ground in (215, 230, 245):
        assert Reader(world)(np.full((1, 64, 64, 3), ground, np.uint8)) == [[]]


def test_pictures_of_another_size_are_told():
    with pytest.raises(ValueError, match=r"expected pictures \[P, 64, 64, 3\], got \[1, 32, 32, 3\]"):
        Reader(World())(np.zeros((1, 32, 32, 3), np.uint8))
