"""Does our PixelCNN++ compute what its authors' does?"""

from collections.abc import Iterator

from models.likelihood import MixtureOutput
from models.pixelcnnpp import PixelCNNPPConfig
from tests.support.rivals.case import Case, Check
from tests.support.rivals.network import check_initialisation, check_pass


def knows(case: Case) -> bool:
    return case.kind in ("pixelcnnpp", "pixelcnnpp_init") and "var_names" in case.arrays


def check(case: Case) -> Iterator[Check]:
    meta = case.meta
    config = PixelCNNPPConfig(
        image_size=max(meta["H"], meta["W"]),  # the network itself takes any multiples of 4
        output=MixtureOutput(components=meta["nr_logistic_mix"]),
        features=meta["nr_filters"],
        blocks=meta["nr_resnet"],
        nonlinearity=meta["resnet_nonlinearity"],
        num_classes=meta.get("n_classes", 0),
    )
    if "n_params" in meta:
        difference = abs(config.account().parameters - meta["n_params"])
        yield Check(case.kind, "float64", "exact", float(difference), "number of parameters")
    yield from check_initialisation(case, config.build) if "x_init" in case.arrays else check_pass(case, config.build)
