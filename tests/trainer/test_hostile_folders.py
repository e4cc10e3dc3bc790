"""Does what a stranger sends stay data? His run, export, data set and compressed picture go through every tool, which
is watched.

Each file of them is in turn a link to a private file, a pipe, a device, far too large, or full of odd values; and their
records name stores and data of his. Whatever the tools answer: nothing is written outside of the folder and of what the
user named, nobody is contacted, and nothing outside is read but code and settings.
"""

import json
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
from PIL import Image

from tests.conftest import pack_photographs
from tests.support.forks import ROOT, Forks, file_calls
from tests.support.launch import mlflow_store, settings, train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
CODES = {0, 2, 65, 69, 73, 74, 77}
SYSTEM = ("/proc", "/sys", "/etc", "/usr", "/lib", "/lib64", "/bin", "/opt", "/dev/null", "/dev/urandom", "/dev/shm")
HUGE = 1 << 40
SENT = "sent.bin"
"""A compressed picture."""
LOADED_LATER = ["torch._dynamo", "matplotlib.figure", "matplotlib.backends.backend_agg", "matplotlib.colorbar"]
LOADED_LATER += ["plotly.offline", "mlflow.store.tracking.sqlalchemy_store", "mlflow.store.db.utils"]
LOADED_LATER += ["mlflow.store.tracking.sqlalchemy_workspace_store", "sqlalchemy.dialects.sqlite", "alembic.command"]
"""What the tools import when they need it, and each child would otherwise import anew."""


def visit(folder: str, named: str, log: str, kind: str) -> int:
    """In a child: all tools, one after the other, on a folder; they print, and exit codes follow."""
    import uvicorn

    from data_pipeline import verify
    from trainer import compare, compress, demo, evaluate, export, plan, sample, tracking

    run, config = ["--run", folder], ["--config", str(ROOT / "configs/quickstart.yaml")]
    tools: list[tuple[Callable[..., int], list[str]]] = [
        (sample.main, [*run, "--n", "1"]),
        (sample.main, [*run, "--n", "1", "--complete-half", "--out", f"{named}/half.png"]),
        (evaluate.main, run),
        (evaluate.main, [*run, "--data-url", f"{named}/data"]),
        (export.main, [*run, "--to", f"{named}/written/exported"]),
        (compare.main, [folder, "--html", f"{named}/page.html"]),
        (demo.main, [*run, "--port", "0"]),
        (plan.main, [*config, "--gpus", "2", "--calibrate", folder]),
        (compress.main, [*run, f"{named}/pixel.png", "--out", f"{named}/written/pixel.bin"]),
        (compress.main, [*run, "--decompress", f"{named}/{SENT}", "--out", f"{named}/written/again.png"]),
        (tracking.main, ["sync", folder]),
        (tracking.main, ["sync", folder, "--to", f"sqlite:///{named}/mlflow.db"]),
    ]
    if kind == "data":
        tools = [(verify.main, [folder])]
    if kind == "compressed":
        exported = ["--run", f"{named}/exported"]
        tools = [(compress.main, [*exported, "--decompress", f"{folder}/{SENT}", "--out", f"{named}/again.png"])]
    os.chdir(named)
    file_calls().file_calls_watch(log.encode())
    with mock.patch.object(uvicorn.Server, "run"):
        for tool, arguments in tools:
            print(f"# {tool.__module__} {' '.join(arguments)}", flush=True)
            try:
                with mock.patch.object(sys, "argv", [tool.__module__, *arguments]):
                    code = tool(arguments) if tool in (export.main, verify.main, plan.main) else tool()
            except SystemExit as error:
                code = error.code
            print(f"# ended with {code}", flush=True)
    return 0


def misbehave(private: str, log: str) -> int:
    """In a child: what a tool must not do, in each way that the library watches."""
    file_calls().file_calls_watch(log.encode())
    Path(private, "validation/manifest.json").read_bytes()
    Path(private, "new").write_text("x")
    os.rename(f"{private}/new", f"{private}/moved")
    with socket.socket() as connection:
        connection.connect_ex(("127.0.0.1", 9))
    return 0


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Forks]]:
    """What the stranger's folders are made of, in a folder; and the process that runs the tools."""
    folder = tmp_path_factory.mktemp("mine")
    for split, images in (("train", 520), ("validation", 8)):
        pack_photographs(str(folder / "data" / split), images=images, split=split)
    changes = {"train__steps": 2, "checkpoint__every_steps": 2, "tracking__sample_every_steps": 2}
    train(settings(folder / "run", folder / "data", tracking__sample_images=1, **changes))
    from trainer import compress, export

    assert export.main(["--run", str(folder / "run"), "--to", str(folder / "exported")]) == 0
    Image.new("RGB", (2, 2), (10, 200, 90)).save(folder / "pixel.png")
    files = [str(folder / "pixel.png"), "--out", str(folder / "compressed" / SENT)]
    with mock.patch.object(sys, "argv", ["compress", "--run", str(folder / "exported"), *files]):
        assert compress.main() == 0
    home = folder / "home"
    home.mkdir()
    environment = {"HOME": str(home), "XDG_STATE_HOME": str(folder / "state"), "MPLCONFIGDIR": str(home / "mpl")}
    tools = ["sample", "evaluate", "export", "compare", "compress", "demo", "plan", "tracking"]
    forks = Forks(folder, ["data_pipeline.verify", *(f"trainer.{tool}" for tool in tools), *LOADED_LATER], environment)
    yield folder, forks
    forks.close()


class Stranger:
    """A folder that he sends, beside private files of the user's, and the tools' visit to it."""

    def __init__(self, kind: str, mine: Path, forks: Forks, place: Path) -> None:
        source = mine / "data/validation" if kind == "data" else mine / kind
        self.kind, self.forks, self.place = kind, forks, place
        self.folder, self.private, self.named = place / "folder", place / "private", place / "named"
        shutil.copytree(source, self.folder)
        shutil.copytree(mine / "data", self.private / "data")
        for name in ("mlflow.db", "mlruns"):
            if (mine / name).exists() and kind == "run":
                (shutil.copytree if (mine / name).is_dir() else shutil.copy)(mine / name, self.private / name)
        self.named.mkdir()
        shutil.copytree(mine / "data/validation", self.named / "data")
        shutil.copytree(mine / "exported", self.named / "exported")
        for name in ("pixel.png", f"compressed/{SENT}"):
            shutil.copy(mine / name, self.named)
        mlflow_store(self.named)
        self.spoiled = ""
        self.tidied = (str(mine / "home"), str(mine / "state"), "/tmp/torchinductor")

    def spoil(self, name: str, how: str) -> None:
        """Let a file, or a folder, be what nobody expects."""
        path, hidden = self.folder / name, self.private / "hidden"
        self.spoiled = f"{name} is {how}"
        if how == "a link":
            path.rename(hidden)
            path.symlink_to(hidden)
        elif how == "huge":
            os.truncate(path, HUGE)
        elif how == "odd":
            text = re.sub(rb"-?\b\d[\d.e+-]*\b", b"-1" + b"0" * 400, path.read_bytes())
            path.write_bytes(re.sub(rb'": "', b'": "\\\\u001b[2J../../', text))
        else:
            path.unlink()
            if how == "a pipe":
                os.mkfifo(path)
            else:
                path.symlink_to("/dev/zero")

    def check(self) -> str:
        """Let the tools visit the folder, and return what they said."""
        before, log = self.content(), self.place / "log"
        ended = self.forks.run(
            "tests.trainer.test_hostile_folders:visit",
            seconds=240,
            folder=str(self.folder),
            named=str(self.named),
            log=str(log),
            kind=self.kind,
        )
        said = f"{self.spoiled}\n{ended.text}"
        assert ended.code == 0, said
        assert "Traceback" not in said and "\x1b" not in said, said
        codes = [int(code) for code in re.findall("^# ended with (.*)$", said, re.MULTILINE)]
        assert len(codes) == (1 if self.kind in ("data", "compressed") else 12) and set(codes) <= CODES, said
        assert self.content() == before, said
        assert self.misdeeds(log) == [], said
        return said

    def misdeeds(self, log: Path) -> list[str]:
        """What the watched process should not have opened, changed, or connected to."""
        return [line for line in log.read_text(errors="replace").splitlines() if not self.allowed(line)]

    def allowed(self, line: str) -> bool:
        what, _, path = line.partition(" ")
        inside = (str(self.folder), str(self.named), *self.tidied)
        code = (str(ROOT), sys.prefix, sys.base_prefix, *SYSTEM)
        if what == "C":
            return False
        memory = ("/dev/null", "/dev/shm/")  # of processes that count together
        if (what, path) == ("R", "/dev"):  # the folder of a device that the user himself names
            return True
        return path.startswith((*inside, *memory)) or (what == "R" and path.startswith(code))

    def content(self) -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in self.private.rglob("*") if path.is_file()}


RUN_FILES = ["config.yaml", "metrics.jsonl", "events.jsonl", "run_state.json", "mlflow_run.json", "mlflow_sent.json",
             "checkpoints/step-000000002/manifest.json",
             "checkpoints/step-000000002/rank-00000-of-00001.attempt-1.safetensors", "repro/packages.txt"]  # fmt: skip
RUN_FOLDERS = ["checkpoints", "checkpoints/step-000000002", "samples", "repro"]
OTHERWISE = ("a pipe", "a device", "huge", "odd")


def test_the_watch_sees_what_no_tool_may_do(mine: tuple[Path, Forks], tmp_path: Path) -> None:
    stranger, log = Stranger("data", *mine, tmp_path / "place"), tmp_path / "log"
    private = str(stranger.private / "data")
    assert mine[1].run("tests.trainer.test_hostile_folders:misbehave", private=private, log=str(log)).code == 0
    expected = [f"R {private}/validation/manifest.json", f"W {private}/new", f"W {private}/moved", f"W {private}/new"]
    assert stranger.misdeeds(log) == [*expected, "C 127.0.0.1:9"]


def test_what_the_files_of_a_run_say_is_data(mine: tuple[Path, Forks], tmp_path: Path) -> None:
    cases = [(name, "a link") for name in [*RUN_FILES, *RUN_FOLDERS]]
    cases += [(name, OTHERWISE[index % len(OTHERWISE)]) for index, name in enumerate(RUN_FILES)]
    for number, (name, how) in enumerate(cases):
        stranger = Stranger("run", *mine, tmp_path / str(number))
        stranger.spoil(name, how)
        stranger.check()
        shutil.rmtree(stranger.place)


def test_what_the_files_of_an_export_say_is_data(mine: tuple[Path, Forks], tmp_path: Path) -> None:
    for number, how in enumerate(("a link", *OTHERWISE)):
        for name in ("config.json", "model.safetensors"):
            stranger = Stranger("exported", *mine, tmp_path / f"{number}-{name}")
            stranger.spoil(name, how)
            stranger.check()


def test_what_the_files_of_a_data_set_say_is_data(mine: tuple[Path, Forks], tmp_path: Path) -> None:
    for number, how in enumerate(("a link", *OTHERWISE)):
        for name in ("manifest.json", "validation-000000.tar"):
            stranger = Stranger("data", *mine, tmp_path / f"{number}-{name}")
            stranger.spoil(name, how)
            assert re.search("^# ended with (2|65|77)$", stranger.check(), re.MULTILINE), (name, how)


def test_a_compressed_picture_of_a_stranger_is_data(mine: tuple[Path, Forks], tmp_path: Path) -> None:
    for how in OTHERWISE:
        stranger = Stranger("compressed", *mine, tmp_path / how)
        stranger.spoil(SENT, how)
        assert f"# ended with {65 if how == 'odd' else 2}" in stranger.check()


@pytest.mark.parametrize("kind", ["run", "exported"])
def test_the_places_that_a_folder_names_are_not_asked(kind: str, mine: tuple[Path, Forks], tmp_path: Path) -> None:
    """With the private files where he says: data, checkpoints, a store, pictures and files to send."""
    for number, place in enumerate(("{}", "../private", "s3://his", "http://127.0.0.1:9")):
        stranger = Stranger(kind, *mine, tmp_path / str(number))
        theirs = place.format(stranger.private)
        if kind == "run":
            shutil.copytree(stranger.folder / "checkpoints", stranger.private / "checkpoints")
            path = stranger.folder / "config.yaml"
            text = re.sub(r"(train|validation)_url: .*", rf"\1_url: {theirs}/data/\1", path.read_text())
            text = re.sub(r"uri: .*", f"uri: sqlite:///{stranger.private}/mlflow.db", text)
            if number % 2:
                text = re.sub(r"  url: null", f"  url: {theirs}/checkpoints", text)
                assert "/checkpoints" in text
            path.write_text(re.sub(r"  dir: .*", f"  dir: {stranger.private}/run", text, count=1))
            record = json.loads((stranger.folder / "mlflow_run.json").read_text())
            record |= {"uri": f"sqlite:///{stranger.private}/mlflow.db", "key": "0123456789abcdef" * 2}
            (stranger.folder / "mlflow_run.json").write_text(json.dumps(record))
            with open(stranger.folder / "events.jsonl", "a") as events:
                for name in (f"{stranger.private}/mlflow.db", "../private/mlflow.db", "/etc/passwd"):
                    for event in ("file", "image"):
                        line = {"step": 2, "time": 1.0, "event": event, "file": name, "key": name, "folder": "../.."}
                        events.write(json.dumps(line) + "\n")
        else:
            path = stranger.folder / "config.json"
            description = json.loads(path.read_text())
            description["card"] |= {f"{split}_url": f"{theirs}/data/{split}" for split in ("train", "validation")}
            path.write_text(json.dumps(description))
        text = stranger.check()
        assert "--data-url" in text, text
        if kind == "run" and number % 2:
            assert "--checkpoint-url" in text, text


def test_a_good_folder_of_somebody_else_can_be_used(mine: tuple[Path, Forks], tmp_path: Path) -> None:
    """Or the tests above would be content with tools that refuse everything."""
    for kind in ("run", "exported", "data", "compressed"):
        stranger = Stranger(kind, *mine, tmp_path / kind)
        codes = re.findall("^# ended with (.*)$", stranger.check(), re.MULTILINE)
        # Not without a name: the validation images twice, and the store to send to. An export is no run.
        expected = {"run": "022000020020", "exported": "022020020022", "data": "0", "compressed": "0"}[kind]
        assert "".join(codes) == expected, kind
