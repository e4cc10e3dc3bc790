"""Do README and ARCHITECTURE name things that exist?"""

import re
from pathlib import Path

import pytest

from trainer.config import SECTIONS

ROOT = Path(__file__).resolve().parents[1]
PATHS = re.compile(r"`((?:trainer|models|data_pipeline|cluster|configs|tests|benchmarks)/[\w./]+)`")


@pytest.mark.parametrize("document", ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_every_file_that_is_named_exists(document: str) -> None:
    named = PATHS.findall((ROOT / document).read_text())
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_every_option_in_the_readmes_commands_exists() -> None:
    options = set(re.findall(r"--set ([a-z_]+)\.([a-z_]+)=", (ROOT / "README.md").read_text())) - {("section", "key")}
    assert options
    for section, key in options:
        assert key in SECTIONS[section].__dataclass_fields__, f"{section}.{key}"


def test_every_config_in_the_documents_exists() -> None:
    text = "".join((ROOT / name).read_text() for name in ("README.md", "ARCHITECTURE.md"))
    for path in set(re.findall(r"configs/\w+\.yaml", text)):
        assert (ROOT / path).exists(), path
