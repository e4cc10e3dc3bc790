"""Does a batch keep together what belongs together when it moves?"""

import pytest
import torch

from data_pipeline.batch import Batch


@pytest.mark.parametrize("complete", [True, False])
def test_a_batch_moves_to_a_device_with_everything_in_it(complete: bool) -> None:
    batch = Batch(
        images=torch.zeros(2, 4, 4, 3, dtype=torch.uint8),
        labels=torch.zeros(2, dtype=torch.int64) if complete else None,
        valid=torch.ones(2, dtype=torch.bool) if complete else None,
        position=7,
    )
    moved = batch.to("meta")
    assert moved.position == 7 and moved.images.device.type == "meta"
    assert (moved.labels is not None) == complete and (moved.valid is not None) == complete
    assert all(tensor is None or tensor.device.type == "meta" for tensor in (moved.labels, moved.valid))
