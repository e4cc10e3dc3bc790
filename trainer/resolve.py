"""Which value does each option of a config have, with defaults and `--set` applied? One line of JSON for programs.

    python -m trainer.resolve --config configs/imagenet64_big.yaml --set run.dir=runs/one

Opens no data. For people, `trainer/run.py --check` prints the same and more.
"""

import argparse
import dataclasses
import json
import sys

from trainer.command_line import run_tool
from trainer.config import load_config


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.resolve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="YAML file, see configs/")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE", help="as for run.py"
    )
    options = parser.parse_args()
    print(json.dumps(dataclasses.asdict(load_config(options.config, options.overrides))))


if __name__ == "__main__":
    sys.exit(run_tool(main))
