"""Are the shipped configs of the paper's tables the models that their headers promise?"""

import re
from pathlib import Path

import pytest

from data_pipeline.packing.resize import IMAGENET_VERSIONS
from models.image_transformer.shape import Local1D
from trainer.config import load_config

CONFIGS = Path(__file__).parents[2] / "configs"
WITH_A_NUMBER = sorted(path.stem for path in CONFIGS.glob("*.yaml") if re.search(r"M\s*(#\s*)?param", path.read_text()))
TABLES = {
    "cifar10_cat": "2.90",
    "cifar10_dmol": "2.90",
    "cifar10_block8": "4.06",
    "cifar10_block16": "3.47",
    "cifar10_block64": "3.13",
    "cifar10_block256": "2.99",
    "cifar10_class": "2.99",
    "imagenet32": "3.77",
    "celeba_sr_1d": "2.68",
    "celeba_sr_2d": "2.61",
}

RIVALS = {
    "cifar10_pixelcnnpp": "2.92",
    "cifar10_pixelsnail": "2.85",
    "imagenet32_pixelsnail": "3.80",
}


def header(name: str) -> str:
    lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    return " ".join(line[1:].strip() for line in lines if line.startswith("#"))


@pytest.mark.parametrize("name", TABLES | RIVALS)
def test_every_row_of_the_papers_tables_has_a_config_that_names_its_number(name: str) -> None:
    assert f"Expected  {(TABLES | RIVALS)[name]} " in header(name)
    assert "Follows" in header(name)


@pytest.mark.parametrize("name", WITH_A_NUMBER)
def test_the_header_states_the_number_of_parameters(name: str) -> None:
    stated = re.search(r"([\d.]+)M parameters", header(name))
    assert stated
    digits = len(stated[1].partition(".")[2])
    parameters = load_config(CONFIGS / f"{name}.yaml", []).model.account().parameters
    assert f"{parameters / 1e6:.{digits}f}" == stated[1]


def test_all_these_configs_state_their_size() -> None:
    assert set(WITH_A_NUMBER) >= {*TABLES, *RIVALS, "imagenet64", "imagenet64_152m", "imagenet64_big"}


@pytest.mark.parametrize("name", [name for name in WITH_A_NUMBER if name.startswith("imagenet")])
def test_results_on_imagenet_say_which_imagenet(name: str) -> None:
    oord = "van den Oord et al. 2016 (1 281 149 training and 49 999 validation images, no labels)"
    assert f"{oord}: version {IMAGENET_VERSIONS['oord']}" in header(name)
    assert f"Chrabaszcz et al. 2017, version {IMAGENET_VERSIONS['chrabaszcz']} (50 000" in header(name)


@pytest.mark.parametrize(("name", "figure"), [("cifar10_sparse", "2.80"), ("imagenet64_sparse", "3.44")])
def test_the_sparse_transformers_configs_name_its_figures_and_what_differs(name: str, figure: str) -> None:
    assert f"Expected  {figure} bits/dim" in header(name)
    assert "What differs:" in header(name)
    model = load_config(CONFIGS / f"{name}.yaml", []).model
    assert {attention.kind for attention in model.attentions} == {"strided_1d", "sliding_1d"}  # type: ignore[union-attr]


def test_the_sparse_model_of_imagenet_differs_from_the_local_one_in_attention_only() -> None:
    sparse, local = (load_config(CONFIGS / f"imagenet64_{name}.yaml", []).model for name in ("sparse", "152m"))
    assert {field for field, value in vars(sparse).items() if value != getattr(local, field)} == {"attention"}


@pytest.mark.parametrize("name", ["imagenet64_152m", "imagenet64_big"])
def test_the_large_models_reach_back_over_the_whole_image(name: str) -> None:
    model = load_config(CONFIGS / f"{name}.yaml", []).model
    # Through each layer the first query of a block sees back by the memory.
    assert isinstance(model.attention, Local1D)
    assert model.layers * model.attention.memory >= model.account().positions


def test_the_ablation_changes_the_block_and_nothing_else() -> None:
    models = [load_config(CONFIGS / f"cifar10_block{block}.yaml", []).model for block in (8, 16, 64, 256)]
    different = {
        field for model in models for field, value in vars(model).items() if value != getattr(models[0], field)
    }
    assert different == {"attention"}
    assert [model.attention for model in models] == [Local1D(query_block=n, memory=n) for n in (8, 16, 64, 256)]
