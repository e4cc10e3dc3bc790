"""Can every shipped config be used as it is, and does it tell what it is for?"""

from pathlib import Path

import pytest
import torch

from data_pipeline.storage import REQUEST_SECONDS
from trainer.config import load_config
from trainer.deepspeed_engine import deepspeed_config

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_is_complete_and_valid(path: Path) -> None:
    config = load_config(path, [])
    assert config.run.name == path.stem
    assert config.run.dir == f"runs/{path.stem}"
    assert deepspeed_config(config, world_size=1)["train_batch_size"] == config.train.global_batch_images
    # Otherwise the watchdog calls a run hung before its reader can say that the store is away.
    assert config.limits.step_seconds > config.data.read_deadline_seconds + 2 * REQUEST_SECONDS
    with torch.device("meta"):
        config.model.build()
    assert config.model.account().parameters > 0


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_begins_with_a_record(path: Path) -> None:
    header = path.read_text().partition("run:")[0]
    for word in ("# Purpose", "# Command", "# Data", "# Expected"):
        assert word in header


def test_no_config_names_a_place_of_one_site() -> None:
    for path in CONFIGS:
        assert "/home/" not in path.read_text()
        assert "/root" not in path.read_text()
