"""How do images become a shuffled, checksummed, reproducible set of WebDataset shards at a URL?

    python -m data_pipeline.pack --source photographs --dest data/train --size 32 --split train --images 12000
    python -m data_pipeline.pack --source folder --input /photos --dest s3://bucket/photos64 --size 64 --split train
    python -m data_pipeline.pack --source imagenet-train --input s3://raw/ILSVRC2012_img_train.tar \\
        --dest s3://bucket/imagenet64/train --size 64 --split train

After an interruption at any point, the same command goes on, and the result is the same to the last byte. On a finished
set it writes the shards that are missing, or says that there is nothing to do. ``--rewrite`` names shards that
``data_pipeline.verify`` found damaged.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

from data_pipeline.packing.plan import Settings
from data_pipeline.packing.resize import PROTOCOLS
from data_pipeline.packing.source import Source
from data_pipeline.packing.sources_arrays import chrabaszcz, cifar10, oord
from data_pipeline.packing.sources_digits import digits
from data_pipeline.packing.sources_folder import folder
from data_pipeline.packing.sources_imagenet import (
    celeba,
    imagenet_folder,
    imagenet_kaggle,
    imagenet_train_tar,
    imagenet_validation,
)
from data_pipeline.packing.sources_parquet import imagenet_parquet
from data_pipeline.packing.sources_photographs import photographs
from data_pipeline.packing.steps import Workforce, pack
from data_pipeline.packing.workers import without_memory
from data_pipeline.storage import EXIT_UNREACHABLE, DataError
from data_pipeline.terminal import guard_terminal
from data_pipeline.wording import counted

SHARD_IMAGES = 8192

EXAMPLES = """examples:
  python -m data_pipeline.pack --source imagenet-train --input s3://raw/ILSVRC2012_img_train.tar \\
      --dest s3://bucket/imagenet64/train --size 64 --split train
  python -m data_pipeline.pack --source imagenet-validation --input s3://raw/ILSVRC2012_img_val.tar \\
      --labels s3://raw/ILSVRC2012_devkit_t12.tar.gz --dest s3://bucket/imagenet64/validation \\
      --size 64 --split validation

several machines:
  Give each the same command with --task-count N and its own --task-index 0 to N - 1, for example those of a Slurm
  array (cluster/pack.sbatch does all of this):
      python -m data_pipeline.pack ... --scratch /shared/scratch --task-index $SLURM_ARRAY_TASK_ID --task-count 16
  A task ends with 75 when its share is done and shares of other tasks are missing: run it again when they are done. In
  the first round all tasks decode, in the second they write shards. The task that finds all shards written writes the
  manifest and ends with 0. Run killed tasks again: nothing is done twice, and the bytes are those of a single machine.

exit codes:
  0 complete  2 wrong option, or no such input  65 damaged input  69 storage away for 10 minutes
  73 cannot write  75 waiting for other tasks  77 refused for safety  130 interrupted"""

SOURCES: dict[str, tuple[str, Callable[[argparse.Namespace], Source]]] = {
    "photographs": (
        "random crops of photographs inside installed packages; takes --images, no --input",
        lambda o: photographs(split=o.split, size=o.size, images=o.images, seed=o.seed),
    ),
    "digits": (
        "coloured handwritten digits, their classes; from scikit-learn's; takes --images, no --input",
        lambda o: digits(split=o.split, size=o.size, images=o.images, seed=o.seed),
    ),
    "folder": ("images in a folder; its subfolders, if any, are the classes", lambda o: folder(o.input)),
    "imagenet-train": ("ILSVRC2012_img_train.tar", lambda o: imagenet_train_tar(o.input)),
    "imagenet-folder": ("extracted images, a folder per WordNet id", lambda o: imagenet_folder(o.input)),
    "imagenet-validation": (
        "ILSVRC2012_img_val.tar or a flat folder of it; takes --labels",
        lambda o: imagenet_validation(o.input, o.labels),
    ),
    "imagenet-kaggle": ("the folder with LOC_synset_mapping.txt", lambda o: imagenet_kaggle(o.input, o.split)),
    "imagenet-parquet": (
        "Hugging Face's parquet files, of ImageNet or others",
        lambda o: imagenet_parquet(o.input, o.split),
    ),
    "imagenet-chrabaszcz": (
        "the folder with the Imagenet32/64 batches, pickled or npz",
        lambda o: chrabaszcz(o.input, o.split, o.size),
    ),
    "imagenet-oord": ("train_64x64.tar of PNG files, or a npy mirror of it", lambda o: oord(o.input, o.size)),
    "cifar10": ("cifar-10-python.tar.gz or the folder in it", lambda o: cifar10(o.input, o.split, o.size)),
    "celeba": ("img_align_celeba.zip or the folder in it", lambda o: celeba(o.input, o.split)),
}
EXTRA_OPTIONS = {"photographs": {"images"}, "digits": {"images"}, "imagenet-validation": {"input", "labels"}}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = parse(arguments)
    guard_terminal()
    try:
        protocol = options.protocol or ("celeba" if options.source == "celeba" else "chrabaszcz")
        settings = Settings(options.split, options.size, protocol, options.seed, options.shard_images)
        workforce = Workforce(
            options.workers, options.scratch, options.task_index, options.task_count, options.max_skipped
        )
        if options.rewrite and options.task_count > 1:
            raise DataError("--rewrite is for a single task: leave out --task-count")
        manifest, fresh = pack(open_source(options), settings, options.dest, workforce, options.rewrite)
    except DataError as error:
        print(f"pack: {error}", file=sys.stderr)
        return error.exit_code
    except MemoryError as error:
        print(f"pack: {without_memory(error)}", file=sys.stderr)
        return EXIT_UNREACHABLE
    except ValueError as error:
        print(f"pack: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\npack: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    megabytes = sum(shard.bytes for shard in manifest.shards) / 1e6
    print(
        f"{options.dest}: {'packed' if fresh else 'already packed with these settings,'} "
        f"{counted(manifest.count, 'image')} of {manifest.name} ({manifest.split}), "
        f"{counted(len(manifest.shards), 'shard')}, {megabytes:,.0f} MB"
    )
    for oddity, count in manifest.source.get("oddities", {}).items():
        print(f"  {oddity}: {count:,}")
    for name in manifest.source.get("skipped", ()):
        print(f"  skipped: {name}")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    listing = "\n".join(f"  {name:<20} {what}" for name, (what, _) in SOURCES.items())
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline.pack",
        description=f"Pack images into shards.\n\nsources:\n{listing}",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--source", required=True, choices=SOURCES, metavar="SOURCE", help="one of the list above")
    parser.add_argument("--input", help="URL of the input: a file, a folder, or below s3://bucket")
    parser.add_argument(
        "--labels", help="URL of the labels of validation images: the devkit's tar.gz, its ground truth"
    )
    parser.add_argument("--dest", required=True, help="where the shards go: a folder or s3://bucket/prefix")
    parser.add_argument("--size", required=True, type=int, help="edge of the packed images in pixels")
    parser.add_argument("--split", required=True, help="train or validation")
    parser.add_argument("--images", type=int, help="photographs and digits only: how many to make")
    parser.add_argument("--seed", type=int, default=0, help="seed of the crops and of the shuffle (default 0)")
    parser.add_argument("--protocol", choices=sorted(PROTOCOLS), help="how images are resized (default chrabaszcz)")
    parser.add_argument("--shard-images", type=int, default=SHARD_IMAGES, help="most images of a shard (default 8192)")
    parser.add_argument("--max-skipped", type=int, default=0, help="images that may be left out if damaged (default 0)")
    parser.add_argument(
        "--rewrite", nargs="+", default=[], metavar="SHARD", help="shards of a finished set to write again, by name"
    )
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: cores)")
    parser.add_argument(
        "--scratch",
        help="folder for unfinished work, which needs as much room as the result; several machines need one that all "
        "of them see (default: inside a local destination, else below /tmp)",
    )
    parser.add_argument("--task-index", type=int, default=0, help="which share of the work to do, from 0 (default 0)")
    parser.add_argument("--task-count", type=int, default=1, help="how many shares there are (default 1: all of it)")
    return parser.parse_args(arguments)


def open_source(options: argparse.Namespace) -> Source:
    """The source that the command line names; raises DataError when one of its options is missing or does not apply."""
    needed = EXTRA_OPTIONS.get(options.source, {"input"})
    for option in ("input", "labels", "images"):
        given = getattr(options, option) is not None
        if given != (option in needed):
            raise DataError(f"--source {options.source} {'takes no' if given else 'needs'} --{option}")
    source = SOURCES[options.source][1](options)
    count = () if options.images is None else ("--images", str(options.images))
    return replace(source, options=("--source", options.source, *count))


if __name__ == "__main__":
    sys.exit(main())
