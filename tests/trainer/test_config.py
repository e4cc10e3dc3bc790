"""Is every mistake in a config found before anything heavy starts, and named so that the user can mend it?"""

from pathlib import Path

import pytest
import yaml

from trainer.config import as_yaml, flat, load_config
from trainer.errors import ConfigError

SMALL_JOB = Path(__file__).resolve().parents[1] / "support/small_job.yaml"


def complaint(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, list(overrides))
    return str(caught.value)


def edited(tmp_path: Path, old: str, new: str) -> Path:
    text = SMALL_JOB.read_text()
    assert old in text
    path = tmp_path / "edited.yaml"
    path.write_text(text.replace(old, new, 1))
    return path


def test_the_resolved_config_reads_back_to_the_same_config(tmp_path: Path) -> None:
    config = load_config(SMALL_JOB, ["model.layers=2", "data.train_url=s3://bucket/a=b"])
    (tmp_path / "config.yaml").write_text(as_yaml(config))
    assert load_config(tmp_path / "config.yaml", []) == config
    assert config.model.layers == 2
    assert config.data.train_url == "s3://bucket/a=b"
    assert flat(config)["model.layers"] == 2


def test_an_override_wins_over_the_file_and_the_last_one_over_the_others() -> None:
    assert load_config(SMALL_JOB, ["train.steps=7", "train.steps=8"]).train.steps == 8


@pytest.mark.parametrize("text", ["3e-4", "3E-4", "3.0e-4", "0.0003"])
def test_numbers_are_numbers_in_every_spelling(text: str) -> None:
    assert load_config(SMALL_JOB, [f"optimizer.peak_lr={text}"]).optimizer.peak_lr == 0.0003


def test_an_unknown_key_is_refused_with_the_nearest_name_and_its_path(tmp_path: Path) -> None:
    assert "model.layres: unknown key; did you mean model.layers?" in complaint(
        edited(tmp_path, "  layers:", "  layres:")
    )
    assert "model.layers: is missing" in complaint(edited(tmp_path, "  layers:", "  layres:"))
    assert "trian: unknown section; did you mean train?" in complaint(SMALL_JOB, "trian.steps=3")


def test_a_key_in_the_wrong_section_is_told_where_it_belongs(tmp_path: Path) -> None:
    assert "train.peak_lr: unknown key; it belongs under optimizer" in complaint(SMALL_JOB, "train.peak_lr=1.0")
    path = tmp_path / "top.yaml"
    path.write_text(SMALL_JOB.read_text() + "peak_lr: 1.0\n")
    assert "peak_lr belongs under a section (optimizer.peak_lr)" in complaint(path)


def test_all_problems_are_reported_at_once() -> None:
    text = complaint(SMALL_JOB, "train.steps=0", "optimizer.beta1=2.0", "model.heads=five", "run.seeed=1")
    for field in ("train.steps", "optimizer.beta1", "model.heads", "run.seeed"):
        assert field in text
    assert len(text.splitlines()) == 4


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.steps=0", "train.steps: must be at least 1, not 0"),
        ("train.steps=1.5", "train.steps: input should be a valid integer, not 1.5"),
        ("train.steps=true", "train.steps: input should be a valid integer, not True"),
        ("train.steps=", "train.steps: input should be a valid integer, not None"),
        ("train.precision=bf8", "train.precision: input should be 'fp32', 'bf16' or 'fp16', not 'bf8'"),
        ("train.zero_stage=4", "train.zero_stage: input should be 0, 1, 2 or 3, not 4"),
        ("optimizer.peak_lr=3e-4x", "optimizer.peak_lr: input should be a valid number, not '3e-4x'"),
        ("optimizer.peak_lr=.inf", "optimizer.peak_lr: must be above 0 and finite"),
        ("optimizer.peak_lr=.nan", "optimizer.peak_lr: must be above 0 and finite"),
        ("optimizer.schedule.warmup_steps=-1", "optimizer.schedule.warmup_steps: must be at least 0, not -1"),
        ("tracking.uri=ftp://x", "tracking.uri: must begin with sqlite:///, http:// or https://"),
        ("tracking.uri=http://me:secret@host", "tracking.uri: must not hold a password"),
        ("train.zero_stage=0", "train.zero_stage: bf16 needs stage 1 or higher"),
        ("train.global_batch_images=33", "33 is not a multiple of train.micro_batch_images 4"),
        ("train.activation_checkpoint_every_layers=9", "is more than model.layers 3"),
        ("model.heads=7", "model.heads: 7"),
        ("steps=3", "write it as section.key=value"),
        ("train.a.b=3", "train.a: unknown key; known are steps"),
        ("=3", "write it as section.key=value"),
        ("train=3", "write it as section.key=value"),
        ("train.steps=[", "the value is not YAML"),
        ("run.seed=2020-99-99", "the value is not YAML"),
        ("run.name=2020-01-01", "run.name: must be text, a number, true, false, a list or null, not"),
    ],
)
def test_a_bad_value_is_named_with_its_path_and_what_is_allowed(override: str, words: str) -> None:
    assert words in complaint(SMALL_JOB, override)


def test_a_key_given_twice_is_refused_with_both_lines(tmp_path: Path) -> None:
    text = complaint(edited(tmp_path, "  layers: 3\n", "  layers: 3\n  layers: 4\n"))
    lines = SMALL_JOB.read_text().splitlines()
    first = lines.index("  layers: 3") + 1
    assert f"layers is given twice, on lines {first} and {first + 1}" in text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "must hold the sections run, model"),
        (b"- 1\n- 2\n", "must hold the sections"),
        (b"run: {name: x\n", "bad.yaml:2:1: "),
        (b"run:\n\tname: x\n", "bad.yaml:2:1: "),
        (b"\xff\xfe\x00", "is not a text file in UTF-8"),
        (b"run: !!python/object/apply:os.system ['touch /tmp/never']\n", "could not determine a constructor"),
        (b"x: " + b"a" * (1 << 20), "is larger than 1 MiB"),
        (b"run: 3\n", "run: must be a section with the keys name, dir"),
        (b"[" * 5000, "is not YAML"),
        (b"run: {seed: 2020-99-99}", "is not YAML"),
        (b"a: &a [x, x]\nb: &b [*a, *a]\nrun: {name: *b}\n", "bad.yaml:2:8: *a: aliases are not allowed here"),
    ],
)
def test_a_file_that_is_no_config_is_refused_in_a_sentence(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    assert words in complaint(path)


def test_a_missing_file_is_named_with_the_nearest_one(tmp_path: Path) -> None:
    assert "no such config file" in complaint(tmp_path / "none.yaml")
    assert f"did you mean {SMALL_JOB}?" in complaint(SMALL_JOB.with_name("smal_job.yaml"))
    assert "cannot be read" in complaint(tmp_path)


def test_a_missing_section_is_named(tmp_path: Path) -> None:
    values = yaml.safe_load(SMALL_JOB.read_text())
    del values["data"]
    path = tmp_path / "short.yaml"
    path.write_text(yaml.safe_dump(values))
    assert "data: this section is missing" in complaint(path)
