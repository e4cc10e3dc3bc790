"""Do options that were tried see the past only, change what they say they change, and cost what they say?"""

from pathlib import Path

import pytest
import torch

from benchmarks import tried_options
from benchmarks.equal_compute import SCORED_IMAGES, Journal, Result, Wanted, unit_of_compute, wanted
from benchmarks.recipe import PART
from benchmarks.rivals import recipe
from benchmarks.tried_options import Option, add_result, options, read_results

OPTIONS = [option for option in options().values() if option.alter]
PLACES = (0, 1, 33, 100, 1000)


def result_of(run: Wanted, mean: float) -> Result:
    """As if the run had been made."""
    bits = (mean,) * SCORED_IMAGES
    return Result(run.config, 1.0, bits, bits, mean, 1.5, "abc")


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_an_option_sees_the_past_only_and_changes_the_model(option: Option) -> None:
    torch.manual_seed(0)
    model = option.altered().model.build().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # some begin at 0, behind which a leak would hide
            parameter.add_(0.05 * torch.randn_like(parameter))
        images = torch.randint(0, 256, (1, 32, 32, 3), dtype=torch.uint8)
        order = model.generation_order

        def said(images: torch.Tensor) -> torch.Tensor:
            return model(images).reshape(len(order), -1)[order]

        before = said(images)
        for place in PLACES:
            changed = images.reshape(1, len(order), -1).clone()
            changed[:, order[place:]] = torch.randint(0, 256, changed[:, order[place:]].shape, dtype=torch.uint8)
            after = said(changed.view(images.shape))
            torch.testing.assert_close(after[: place + 1], before[: place + 1], rtol=1e-4, atol=1e-3)
            assert not torch.allclose(after[place + 1 :], before[place + 1 :], rtol=1e-4, atol=1e-3)


def test_a_leak_is_seen() -> None:
    def peeks(model: tried_options.ImageTransformer) -> None:
        model.layers[-1].register_forward_pre_hook(lambda _, given: (given[0] + given[0].roll(-1, 1), *given[1:]))

    leaking = Option("peeks", recipe(), peeks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tried_options, "options", lambda: {"peeks": leaking})
        with pytest.raises(AssertionError, match="not close"):
            test_an_option_sees_the_past_only_and_changes_the_model(leaking)


@pytest.mark.parametrize("option", options().values(), ids=lambda option: option.name)
def test_an_option_gets_as_many_flops_as_what_it_is_compared_with(option: Option) -> None:
    config = option.run(0).config
    flops = config.train.steps * config.train.global_batch_images * config.model.account().flops.training
    assert flops == pytest.approx(option.budget * unit_of_compute(), rel=0.01)


@pytest.mark.parametrize("option", [option for option in options().values() if option.images], ids=lambda o: o.name)
def test_other_values_for_the_same_colours_lose_none(option: Option) -> None:
    assert option.images
    images = torch.arange(3 << 12).mul(37).to(torch.uint8).view(1, 64, 64, 3)
    colours = images.view(-1, 3).unique(dim=0)
    assert len(option.images(images).view(-1, 3).unique(dim=0)) == len(colours) > 200


def test_results_are_read_back_and_those_of_other_steps_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, option = tmp_path / "made.jsonl", options()["value residual"]
    add_result(path, option, 1, result_of(option.run(1), 3.5))
    path.write_text(
        path.read_text() + path.read_text().replace('"steps":', '"steps":1').replace('"seed":1', '"seed":2')
    )
    assert [key for key in read_results(path)] == [("value residual", 1)]

    monkeypatch.setattr("benchmarks.report.RESULTS", tmp_path / "RESULTS.md")
    journal = Journal(tmp_path / "journal.jsonl")
    journal.add(result_of(wanted(recipe(), PART, 1), 3.75))
    tried_options.write(path, journal)
    assert (
        "| value residual | 114,074 | 540 | 1 | 3.500 | 3.750 | -0.250 ± 0.000 | 2 |"
        in (tmp_path / "RESULTS.md").read_text()
    )
