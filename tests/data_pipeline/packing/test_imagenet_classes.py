"""Is the table of classes the published one?"""

from data_pipeline.packing.imagenet_classes import IMAGENET_CLASSES, WNIDS_IN_DEVKIT_ORDER


def test_classes_have_their_well_known_indices() -> None:
    """The indices that pretrained classifiers of every library answer with."""
    known = {0: "n01440764", 207: "n02099601", 281: "n02123045", 388: "n02510455", 817: "n04285008", 999: "n15075141"}
    assert {index: IMAGENET_CLASSES[index] for index in known} == known
    assert len(set(IMAGENET_CLASSES)) == 1000


def test_devkit_numbers_are_those_of_its_documentation() -> None:
    assert WNIDS_IN_DEVKIT_ORDER[:3] == ("n02119789", "n02100735", "n02110185")
    assert WNIDS_IN_DEVKIT_ORDER[999] == "n03255030"


def test_devkit_order_is_the_class_index_nowhere() -> None:
    assert not any(a == b for a, b in zip(WNIDS_IN_DEVKIT_ORDER, IMAGENET_CLASSES, strict=True))
