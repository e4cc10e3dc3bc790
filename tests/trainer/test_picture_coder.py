"""Do pixels come back from their streams whatever the model is, and are streams as short as the likelihood says?"""

import contextlib
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from models.likelihood import nats
from models.model import Model
from models.teacher_forcing import parameters_in_turn
from tests.models.test_family_contract import FAMILIES, built, opinionated
from tests.support.tiny_model import random_given, random_images, tiny_config
from trainer import picture_coder
from trainer.errors import Irreproducible
from trainer.picture_coder import Picture, decode, encode, in_fp64

NAMES = [name for name, config in FAMILIES.items() if not config.small_size]


def coded(model: Model, pixels: Tensor, *, is_gray: bool = False, batch_tiles: int = 64) -> tuple[list[bytes], Tensor]:
    """The streams of a picture, and what comes back from them."""
    label = 1 if model.config.num_classes else None
    options = {"is_gray": is_gray, "label": label, "batch_tiles": batch_tiles, "progress": lambda done: None}
    height, width, _ = pixels.shape
    with in_fp64(model):
        streams = encode(model, pixels, **options)  # type: ignore[arg-type]
        return streams, decode(model, streams, height=height, width=width, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", NAMES)
def test_pixels_come_back_for_every_family(family: str) -> None:
    model = opinionated(built(family))
    pixels = random_images(1, 7)[0, :, :5]
    streams, back = coded(model, pixels)
    assert torch.equal(back, pixels)
    gray = pixels[..., :1].expand(-1, -1, 3)
    in_gray, back = coded(model, gray, is_gray=True)
    assert torch.equal(back, gray)
    assert sum(map(len, in_gray)) < 0.6 * sum(map(len, streams))


@pytest.mark.parametrize("family", NAMES)
def test_in_turn_a_model_says_what_it_says_of_whole_images_to_twelve_digits(family: str) -> None:
    """So what is rounded to 2^-14 is the same for other batches, threads and processors, but in one case of a
    million."""
    model = opinionated(built(family))
    images, given = random_images(3, 4), random_given(model.config, 3)
    truth = images.view(3, len(model.generation_order), -1)
    with in_fp64(model), torch.no_grad():
        whole = model(images, given).reshape(3, len(model.generation_order), -1)
        assert whole.dtype == torch.float64
        values = torch.zeros_like(truth)
        for positions, parameters in parameters_in_turn(model, values, given):
            values[:, positions] = truth[:, positions]
            torch.testing.assert_close(parameters.flatten(2), whole[:, positions], rtol=0, atol=1e-11)
    assert next(model.parameters()).dtype == torch.get_default_dtype() == torch.float32
    assert torch.equal(values, truth)


@pytest.mark.parametrize("family", ["image_transformer", "pixelcnn", "image_transformer, pixels, 2d", "pixelsnail"])
def test_streams_are_as_long_as_the_values_are_improbable(family: str) -> None:
    model, tiles = built(family).eval(), random_images(64, 4) // 4 + 100
    pixels = Picture(32, 32, False, 4).joined(tiles)
    streams, _ = coded(model, pixels)
    with torch.no_grad():
        bits = nats(model.config.output, model(tiles), tiles).sum().item() / math.log(2)
    assert len(streams) == 1
    assert bits - 32 < 8 * len(streams[0]) < 1.002 * bits + 32


def test_streams_are_the_same_whatever_the_batch_and_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture_coder, "PIXELS_OF_A_STREAM", 3 * 16)
    model = opinionated(built("image_transformer, predictors and stem"))
    pixels = random_images(1, 18)[0, :14]
    threads = torch.get_num_threads()
    found = []
    try:
        for number, batch in ((1, 1), (1, 64), (2, 7), (3, 6)):
            torch.set_num_threads(number)
            streams, back = coded(model, pixels, batch_tiles=batch)
            assert torch.equal(back, pixels)
            found.append(streams)
    finally:
        torch.set_num_threads(threads)
    assert len(found[0]) == 7  # of 4 x 5 tiles, three to a stream
    assert all(streams == found[0] for streams in found)


def test_cutting_and_joining_keep_every_pixel_and_edges_repeat_the_nearest() -> None:
    pixels = random_images(1, 11)[0, :6]
    picture = Picture(6, 11, False, 4)
    tiles = picture.cut(pixels)
    assert tiles.shape == (6, 4, 4, 3)
    assert torch.equal(picture.joined(tiles), pixels)
    nearest = picture.nearest(slice(0, 6))
    filled = tiles.view(6, 16, 3).gather(1, nearest[..., None].expand(-1, -1, 3)).view(6, 4, 4, 3)
    expected = np.pad(pixels.numpy(), ((0, 2), (0, 1), (0, 0)), mode="edge")
    assert np.array_equal(Picture(8, 12, False, 4).joined(filled).numpy(), expected)


def test_streams_that_nobody_wrote_are_noticed_or_give_pixels() -> None:
    model = opinionated(built("pixelcnn"))
    pixels = random_images(1, 8)[0]
    streams, _ = coded(model, pixels)
    for stream in (streams[0][:-40], bytes(len(streams[0])), streams[0][:8] + bytes(8) + streams[0][16:]):
        with in_fp64(model), contextlib.suppress(Irreproducible):
            options = {"is_gray": False, "label": None, "batch_tiles": 8, "progress": lambda done: None}
            back = decode(model, [stream], height=8, width=8, **options)  # type: ignore[arg-type]
            assert back.shape == pixels.shape and not torch.equal(back, pixels)


def test_a_model_that_gives_some_values_no_probability_can_code_them() -> None:
    model = tiny_config().build().eval()
    with torch.no_grad():
        model.head.bias[:200] = -1e4
    pixels = random_images(1, 4)[0]
    streams, back = coded(model, pixels)
    assert torch.equal(back, pixels)
    assert 8 * len(streams[0]) < 24 * pixels.numel() + 64
