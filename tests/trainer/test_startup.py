"""Is a job refused whose data, weights or earlier attempts do not fit its config?"""

import pytest

from data_pipeline.loader import Shards
from tests.support.launch import QUICKSTART
from trainer.checkpoint import Checkpoint
from trainer.config import RunConfig, load_config
from trainer.errors import UsageError
from trainer.startup import check_fits
from trainer.typed_values import plain


def config_with(**options: int) -> RunConfig:
    return load_config(str(QUICKSTART), [f"{name.replace('__', '.')}={value}" for name, value in options.items()])


def checkpoint_of(config: RunConfig, shards: Shards, *, samples: int, step: int = 5) -> Checkpoint:
    return Checkpoint(step, step, samples, None, plain(config), shards.digest, [])


def test_another_number_of_lanes_is_refused_within_an_epoch(shards: Shards) -> None:
    """The data set has 3000 images in 6 blocks, so that 4 lanes are 4, and 8 are 4 as well."""
    first, url = config_with(data__lanes=1), "url"
    for samples in (1, 2999, 3001, 8000):
        with pytest.raises(
            UsageError, match="data.lanes is 4, and step-000000005 was written with 1 .*data.lanes=1, or"
        ):
            check_fits(checkpoint_of(first, shards, samples=samples), config_with(data__lanes=4), shards, url)
    for samples in (0, 3000, 9000):
        check_fits(checkpoint_of(first, shards, samples=samples), config_with(data__lanes=4), shards, url)
    finished = checkpoint_of(first, shards, samples=1, step=first.train.steps)
    check_fits(finished, config_with(data__lanes=4), shards, url)


@pytest.mark.parametrize(
    "options",
    [{"data__lanes": 8}, {"data__fetch_threads": 1}, {"train__global_batch_images": 8, "train__micro_batch_images": 4}],
)
def test_what_leaves_the_order_alone_may_change_within_an_epoch(shards: Shards, options: dict[str, int]) -> None:
    before = checkpoint_of(config_with(data__lanes=4), shards, samples=1)
    check_fits(before, config_with(**({"data__lanes": 4} | options)), shards, "url")
