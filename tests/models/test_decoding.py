"""Is a drawing told of as it goes, left as it was found, and refused where it makes no sense, whatever decodes it?"""

from typing import Any

import pytest
import torch

from models.decoding import consistency, generate
from models.drawing.draw import Sampling
from models.given import Given
from models.model import Model
from tests.support.tiny_model import random_images, tiny_config


def build(**changes: Any) -> Model:
    torch.manual_seed(0)
    return tiny_config(**changes).build().eval()


def test_consistency_is_the_distance_of_the_shrunk_image_to_the_small_one() -> None:
    small = random_images(2, 4)
    enlarged = small.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert consistency(enlarged, small).tolist() == [0, 0]
    brighter = (enlarged // 2 + 51).clone()
    torch.testing.assert_close(consistency(brighter, small // 2), torch.tensor([0.2, 0.2]))


def test_progress_is_told_after_each_position() -> None:
    calls: list[tuple[int, int]] = []
    generate(build(), 4, seed=0, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(done, 48) for done in range(1, 49)]


def test_the_model_is_left_as_it_was() -> None:
    model = build(dropout=0.5).train()
    assert torch.equal(generate(model, 1, seed=0), generate(model, 1, seed=0))
    assert model.training


def test_bf16_weights_can_be_sampled() -> None:
    images = generate(build().bfloat16(), 2, seed=0)
    assert images.dtype == torch.uint8 and images.shape == (2, 4, 4, 3)


def test_what_cannot_be_done_is_refused() -> None:
    model = build()
    known = torch.arange(48) < 5
    with pytest.raises(ValueError, match=r"known: torch.bool \[49\], but the model asks for bool \[48\]"):
        generate(model, 1, seed=0, images=random_images(1, 4), known=torch.ones(49, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"known: torch.int64 \[48\], but the model asks for bool"):
        generate(model, 1, seed=0, images=random_images(1, 4), known=torch.arange(48))
    with pytest.raises(ValueError, match="known: 5 positions, but no images"):
        generate(model, 1, seed=0, known=known)
    with pytest.raises(ValueError, match="labels: given"):
        generate(model, 1, seed=0, given=Given(labels=torch.tensor([0])))
    with pytest.raises(ValueError, match="labels: from 1 to 5, but classes are 0 to 4"):
        generate(build(num_classes=5), 2, seed=0, given=Given(labels=torch.tensor([1, 5])))
    with pytest.raises(ValueError, match="guidance: 2.0, but the model knows no images without a class"):
        generate(
            build(num_classes=5), 1, seed=0, given=Given(labels=torch.tensor([0])), sampling=Sampling(guidance=2.0)
        )
    with pytest.raises(ValueError, match="images: 2 images, but 3 are to be drawn"):
        generate(model, 3, seed=0, images=random_images(2, 4), known=known)
