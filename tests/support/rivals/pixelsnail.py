"""Does our PixelSNAIL compute what its authors' does?"""

from collections.abc import Iterator

from models.likelihood import MixtureOutput
from models.pixelsnail import PixelSNAILConfig
from tests.support.rivals.case import Case, Check
from tests.support.rivals.network import check_initialisation, check_pass


def knows(case: Case) -> bool:
    return case.kind in ("pixelsnail", "pixelsnail_init") and "var_names" in case.arrays


def check(case: Case) -> Iterator[Check]:
    meta = case.meta
    config = PixelSNAILConfig(
        image_size=max(meta["H"], meta["W"]),  # the network itself takes other rectangles, too
        output=MixtureOutput(components=meta["nr_logistic_mix"]),
        features=meta["nr_filters"],
        blocks=meta["attn_rep"] if "attn_rep" in meta else num_attentions(case),
        convolutions=meta["nr_resnet"],
        nonlinearity=meta["resnet_nonlinearity"],
        key_pooling=meta.get("att_downsample", 1),
    )
    if "n_params" in meta:
        difference = abs(config.account().parameters - meta["n_params"])
        yield Check(case.kind, "float64", "exact", float(difference), "number of parameters")
    yield from check_initialisation(case, config.build) if "x_init" in case.arrays else check_pass(case, config.build)


def num_attentions(case: Case) -> int:
    """By the names of the variables: nine dense layers with each attention, and one at the end."""
    return (
        sum(str(name).startswith("model/dense_") and str(name).endswith("/V") for name in case.arrays["var_names"]) // 9
    )
