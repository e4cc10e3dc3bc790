"""Does a program that reads the JSON of a config see what the trainer sees?"""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from trainer import resolve
from trainer.config import config_from, load_config

CONFIG = str(Path(__file__).resolve().parents[2] / "tests/support/small_job.yaml")


def test_the_json_reads_back_to_the_same_config(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["resolve", "--config", CONFIG, "--set", "train.steps=7"])
    resolve.main()
    values = json.loads(capsys.readouterr().out)
    config = load_config(CONFIG, ["train.steps=7"])
    assert values["train"]["steps"] == 7
    assert values.keys() == {field.name for field in dataclasses.fields(config)}
    assert config_from(values, "the printed line") == config
