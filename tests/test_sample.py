"""Do the pictures that people look at show what was drawn?"""

import numpy as np
import torch

from trainer.sample import GAP, grid, interleave


def test_a_grid_shows_each_image_in_its_place_enlarged() -> None:
    images = torch.arange(3 * 2 * 2 * 3, dtype=torch.uint8).view(3, 2, 2, 3)
    picture = np.asarray(grid(images, columns=2, enlarge=3))
    pitch = 2 + GAP
    assert picture.shape == (3 * (GAP + 2 * pitch), 3 * (GAP + 2 * pitch), 3)
    small = picture[::3, ::3]
    assert np.array_equal(small.repeat(3, 0).repeat(3, 1), picture)
    for index, image in enumerate(images.numpy()):
        top, left = GAP + index // 2 * pitch, GAP + index % 2 * pitch
        assert np.array_equal(small[top : top + 2, left : left + 2], image)
    assert (small[:GAP] == 255).all()
    assert (small[-2 - GAP :, -2 - GAP :] == 255).all()  # the empty last place


def test_interleaved_groups_stand_side_by_side() -> None:
    a, b = torch.tensor([[1], [2]]), torch.tensor([[10], [20]])
    assert interleave(a, b).flatten().tolist() == [1, 10, 2, 20]
