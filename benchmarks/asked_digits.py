"""How often is a drawn digit the one that was asked for, as a classifier of scikit-learn reads it?

    python benchmarks/asked_digits.py --run runs/digits --weights ema

The classifier, a support vector machine, learns from the digits that the model was trained on. It is itself wrong now
and then: its accuracy on the digits of the validation split stands beside that on the drawn ones.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from sklearn.svm import SVC

from benchmarks.attention import versions
from benchmarks.report import table, write_section
from data_pipeline.packing.sources_digits import NAMES, NUM_DIGITS, NUM_TRAINING, digits
from models.decoding import generate
from models.given import Given
from trainer.trained_model import add_run_arguments, load_trained_model


def shapes(images: np.ndarray) -> np.ndarray:
    """What is left without the ink's colour: of uint8 [N, S, S, 3] the brightest channel, relative to the brightest
    pixel, [N, S * S]."""
    brightest = images.max(-1).reshape(len(images), -1) / 255
    return brightest / np.maximum(brightest.max(-1, keepdims=True), 1 / 255)


def real_digits(split: str, size: int, images: int) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, S, S, 3] and labels [N]."""
    source = digits(split=split, size=size, images=images, seed=0)
    items = [item for group in source.groups for item in group.read()]
    return np.stack([np.asarray(item.image) for item in items]), np.array([item.label for item in items])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser)
    parser.add_argument("--images", type=int, default=500, help="how many to draw (default 500)")
    arguments = parser.parse_args()
    trained = load_trained_model(arguments.run, arguments.weights, arguments.last, arguments.checkpoint_url)
    size = trained.card.model.image_size
    images, labels = real_digits("train", size, NUM_TRAINING)
    classifier = SVC(C=10).fit(shapes(images), labels)
    images, labels = real_digits("validation", size, NUM_DIGITS - NUM_TRAINING)
    on_real = (classifier.predict(shapes(images)) == labels).mean()

    asked = np.arange(arguments.images) % len(NAMES)
    given = Given(labels=torch.from_numpy(asked).to(trained.device))
    drawn = generate(trained.model, len(asked), seed=0, given=given).cpu().numpy()
    found = classifier.predict(shapes(drawn))
    rows = [["all", str(len(asked)), f"{(found == asked).mean():.1%}", ""]]
    for digit, name in enumerate(NAMES):
        read = found[asked == digit]
        others = np.bincount(read[read != digit], minlength=len(NAMES))
        often = ", ".join(f"{NAMES[other]} {others[other]}" for other in others.argsort()[::-1][:2] if others[other])
        rows.append([name, str(len(read)), f"{(read == digit).mean():.0%}", often])
    text = (
        f"{', '.join(versions())}; {trained.weights} weights of step {trained.step}, drawn without guidance at "
        f"temperature 1. The classifier reads {on_real:.1%} of the {len(labels)} validation digits right.\n\n"
    )
    text += table(["asked for", "drawn", "read as that", "most often else"], rows)
    print(text)
    command = f"python benchmarks/asked_digits.py --run {arguments.run} --weights {trained.weights}"
    write_section("digits that were asked for", command, text)


if __name__ == "__main__":
    main()
