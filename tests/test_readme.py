"""Do README and ARCHITECTURE name things that exist?"""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.pack import main as pack
from tests.support.launch import curve, mlflow_store, train
from trainer.config import RunConfig
from trainer.typed_values import paths

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("trainer", "models", "data_pipeline", "cluster")
PATHS = re.compile(r"`((?:trainer|models|data_pipeline|cluster|configs|tests|benchmarks)/[\w./]+)`")


@pytest.mark.parametrize("document", ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_every_file_that_is_named_exists(document: str) -> None:
    named = PATHS.findall((ROOT / document).read_text())
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_the_index_leads_to_every_source_file() -> None:
    """By its name, or by that of a room that holds it; the name of a whole package is not enough."""
    index = set(PATHS.findall((ROOT / "README.md").read_text().partition("## Where is what")[2]))
    assert {"trainer/loop.py", "data_pipeline/packing/"} <= index
    rooms = tuple(name for name in index if name.endswith("/") and name.count("/") >= 2)
    missing = []
    for path in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.*")):
        name, is_source = path.relative_to(ROOT).as_posix(), path.suffix in (".py", ".sbatch", ".html")
        if is_source and path.name != "__init__.py" and name not in index and not name.startswith(rooms):
            missing.append(f"| {question_of(path)} | `{name}` |")
    assert not missing, "add to the table `Where is what` in README.md, in its words:\n" + "\n".join(missing)


def question_of(path: Path) -> str:
    """The first sentence of a source file, which says what it answers."""
    lines = [line.strip('#" ') for line in path.read_text().splitlines() if not line.startswith("#!")]
    return next(line for line in lines if line)


def test_every_option_in_the_readmes_commands_exists() -> None:
    options = set(re.findall(r"--set \"?([a-z_.]+)=", (ROOT / "README.md").read_text())) - {"section.key"}
    assert options
    assert options <= set(paths(RunConfig))


def test_every_config_in_the_documents_exists() -> None:
    text = "".join((ROOT / name).read_text() for name in ("README.md", "ARCHITECTURE.md"))
    for path in set(re.findall(r"configs/\w+\.yaml", text)):
        assert (ROOT / path).exists(), path


def test_the_config_of_a_users_own_images_trains_on_a_packed_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (config,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(config.splitlines()) <= 24
    (tmp_path / "mine.yaml").write_text(config)
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 50, 3), dtype=np.uint8)
    for index, image in enumerate(pixels):
        folder = tmp_path / "photos" / ("validation" if index < 8 else "train")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{index}.png")
    for split in ("train", "validation"):
        source = ["--source", "folder", "--input", f"photos/{split}", "--dest", f"data/mine/{split}"]
        assert pack(["--split", split, "--size", "32", *source]) == 0
    small = ["train.steps=2", f"tracking.uri={mlflow_store(tmp_path)}", "train.log_every_steps=1"]
    places = [
        f"run.dir={tmp_path}/run",
        *(f"data.{split}_url={tmp_path}/data/mine/{split}" for split in ("train", "validation")),
    ]
    train([argument for each in small + places for argument in ("--set", each)], config=tmp_path / "mine.yaml")
    assert [step for step, _ in curve(tmp_path / "run")] == [1, 2]
