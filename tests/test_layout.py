"""Does every import point the way ARCHITECTURE.md says, and does each library have one home?"""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What each package may import besides the standard library and itself.
ALLOWED = {
    "models": {"torch", "triton"},
    "data_pipeline": {
        "torch", "numpy", "PIL", "webdataset", "fsspec", "xxhash", "botocore", "aiohttp", "pyarrow",
        "pydantic",
    },
    "trainer": {
        "torch", "numpy", "PIL", "models", "data_pipeline",
        "deepspeed", "filelock", "mlflow", "yaml", "pydantic", "fsspec", "safetensors",
        "starlette", "uvicorn", "matplotlib", "plotly", "pylibjxl", "constriction",
    },
    "cluster": {"torch", "fsspec"},
}  # fmt: skip
# Replacing one of these libraries touches these files only.
HOME = {
    "deepspeed": {"trainer/deepspeed_engine.py"},
    "mlflow": {
        f"trainer/{name}.py"
        for name in ("record/mlflow_mirror", "record/system_metrics", "record/tracker", "comparison/mlflow_history")
    },
    "yaml": {"trainer/config.py"},
    "pydantic": {"trainer/typed_values.py", "data_pipeline/typed_records.py"},
    "safetensors": {"trainer/tensor_file.py"},
    "PIL": {"data_pipeline", "trainer"},
    "matplotlib": {"trainer/heat_map.py"},
    "plotly": {"trainer/comparison/page.py"},
    "constriction": {"trainer/picture_coder.py"},
    "starlette": {"trainer/demo.py"},
    "uvicorn": {"trainer/demo.py"},
}
# Commands that make, index and check shards, with their room. Reading shards, which is what training does, needs none.
PACKING_SIDE = {f"data_pipeline.{name}" for name in ("packing", "pack", "index", "verify")}
VAGUE = {"utils", "util", "common", "helpers", "misc", "core", "base", "manager"}
SOURCES = sorted(p for package in ALLOWED for p in (ROOT / package).rglob("*.py") if p.name != "__init__.py")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(tree: ast.Module) -> set[str]:
    modules: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written in full, so that a search finds them"
            modules |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
            modules |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    return modules


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_source_file_imports_what_its_package_may(path: Path) -> None:
    here, package = name_of(path), path.relative_to(ROOT).parts[0]
    tree = ast.parse(path.read_text())
    roots = {module.split(".")[0] for module in imported(tree)} - sys.stdlib_module_names
    assert roots <= ALLOWED[package] | {package}
    assert all(here in HOME[root] or package in HOME[root] for root in roots & HOME.keys())


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_source_file_says_what_it_answers_and_shadows_no_library(path: Path) -> None:
    documentation = ast.get_docstring(ast.parse(path.read_text()))
    assert documentation
    # The launcher puts trainer/ first on the search path; trainer/run.py takes it off, other launchers may not.
    assert path.stem not in sys.stdlib_module_names | HOME.keys() | VAGUE


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_what_reads_shards_imports_nothing_that_makes_them(path: Path) -> None:
    module = name_of(path).removesuffix(".py").replace("/", ".")
    if not makes_shards(module):
        assert not [found for found in imported(ast.parse(path.read_text())) if makes_shards(found)]


def makes_shards(module: str) -> bool:
    return ".".join(module.split(".")[:2]) in PACKING_SIDE


def imports_of_ours() -> dict[str, set[str]]:
    """Each of our modules with those of ours that it imports."""
    modules = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in SOURCES}
    return {name: imported(ast.parse(path.read_text())) & modules.keys() for name, path in modules.items()}


def test_there_are_no_import_cycles() -> None:
    TopologicalSorter(imports_of_ours()).prepare()


def test_there_are_no_import_cycles_between_rooms() -> None:
    rooms: dict[str, set[str]] = {}
    for module, found in imports_of_ours().items():
        rooms.setdefault(room_of(module), set()).update({room_of(other) for other in found} - {room_of(module)})
    assert {"trainer.record", "trainer.faults", "trainer.comparison", "trainer.loop"} <= rooms.keys()
    TopologicalSorter(rooms).prepare()


def room_of(module: str) -> str:
    """A folder inside a package counts as one; a file beside it is a room of its own."""
    return ".".join(module.split(".")[:2])


def test_the_errors_are_on_the_ground_floor() -> None:
    assert imported(ast.parse((ROOT / "trainer/errors.py").read_text())) == set()


def test_what_records_and_what_watches_know_no_command_line_tool() -> None:
    inside = {module for module in imports_of_ours() if room_of(module) in ("trainer.record", "trainer.faults")}
    assert {"trainer.record.tracker", "trainer.faults.watchdog"} <= inside
    assert not {module for module in reached_from(inside) if is_tool(module)}


def test_the_job_imports_no_command_line_tool() -> None:
    reached = reached_from({"trainer.run"})
    assert {"trainer.loop", "data_pipeline.order", "models.attention.pattern"} <= reached  # the walk gets everywhere
    assert {module for module in reached if is_tool(module)} == {"trainer.run"}


def reached_from(modules: set[str]) -> set[str]:
    """These modules and all of ours that they import, directly or not."""
    graph, reached, ahead = imports_of_ours(), set[str](), modules
    while ahead:
        reached |= ahead
        ahead = set().union(*(graph[module] for module in ahead)) - reached
    return reached


def is_tool(module: str) -> bool:
    """Whether users call the module: it has a `main`."""
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
    return any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)


def test_the_trainer_asks_the_interface_of_models_and_knows_the_families_in_its_config_alone() -> None:
    names = (
        "image_transformer",
        "pixelcnn",
        "gated_pixelcnn",
        "row_lstm",
        "diagonal_bilstm",
        "pixelsnail",
        "weight_norm",
    )
    families = tuple(f"models.{name}" for name in names)
    knowing = {
        name
        for name, modules in imports_of_ours().items()
        if name.startswith("trainer") and any(module.startswith(families) for module in modules)
    }
    assert knowing == {"trainer.config"}
