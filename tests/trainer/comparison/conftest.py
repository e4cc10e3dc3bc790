"""Which two runs do the tests of the comparison look at?"""

from pathlib import Path

import pytest

from tests.support.recorded_runs import make_run


@pytest.fixture(scope="session")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The folders of two runs that differ in width. The name of one would be a tag if nobody escaped it."""
    folder = tmp_path_factory.mktemp("runs")
    return [make_run(folder, "small", 3.9, "model.width=96"), make_run(folder, "large <b>", 3.8, "model.width=192")]
