"""How is a training, packing or evaluation job filled in and submitted to Slurm?

    python -m cluster.submit --config configs/imagenet64_big.yaml --nodes 8 --time 24:00:00 --set run.world_size=64
    python -m cluster.submit --job evaluate --time 2:00:00 --after 4711 -- --run runs/imagenet64_big --weights ema
    python -m cluster.submit --job pack --tasks 32 --time 4:00:00 -- --source imagenet-train --input ... --scratch ...

fills in cluster/train.sbatch, evaluate.sbatch or pack.sbatch and submits it; `--dry-run` prints the script instead,
which `sbatch --test-only` takes. A training is checked first, by `trainer/run.py --check` for its number of ranks. What
the config says, its defaults included, comes from `python -m trainer.resolve`.

exit codes: 0 submitted · 2 options or config · 69 Slurm does not answer or refuses · others: the trainer's check
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
USAGE, UNAVAILABLE = 2, 69
SERVER_SECONDS = 3.0
_TIME = re.compile(r"\d+|\d+:\d\d(:\d\d)?|\d+-\d\d?(:\d\d){0,2}")
_NODES = re.compile(r"([1-9]\d*)(?:-([1-9]\d*))?")


class SubmitError(ValueError):
    """What cannot be submitted, in one sentence."""


class Refused(Exception):
    """The trainer refused the config and has said why."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def parser() -> argparse.ArgumentParser:
    default = os.environ.get
    result = argparse.ArgumentParser(
        prog="python -m cluster.submit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--job", choices=("train", "evaluate", "pack"), default="train", help="which script (train)")
    result.add_argument("--config", help="train: YAML file, see configs/")
    result.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE", help="train: as for run.py"
    )
    result.add_argument("--from", dest="source", metavar="EXPORT_DIR", help="train: as for run.py")
    result.add_argument("--nodes", help="train: how many; with MIN-MAX it goes on with fewer after a loss")
    result.add_argument("--tasks", type=int, help="pack: parts that the work is cut into, one array task each")
    result.add_argument("--time", required=True, help="limit in Slurm's forms: minutes, 24:00:00 or 2-12")
    result.add_argument("--dry-run", action="store_true", help="print the script and submit nothing")
    result.add_argument("--no-check", action="store_true", help="train: leave out the check, which opens the data")
    result.add_argument("--after", metavar="JOB", help="begin when this job has ended well; several with commas")
    result.add_argument("--warn-seconds", type=int, default=300, help="train: warning before the limit (300)")
    site = result.add_argument_group("the site's, from the environment if not given")
    site.add_argument("--partition", default=default("SBATCH_PARTITION"), help="SBATCH_PARTITION")
    site.add_argument("--account", default=default("SBATCH_ACCOUNT"), help="SBATCH_ACCOUNT")
    site.add_argument("--exclude", default=default("SBATCH_EXCLUDE"), help="nodes to leave out; SBATCH_EXCLUDE")
    site.add_argument("--gpus-per-node", type=int, default=default("GPUS_PER_NODE", "8"), help="GPUS_PER_NODE (8)")
    site.add_argument("--tasks-per-node", type=int, help="without GPUS (--gpus-per-node 0): processes a node (1)")
    site.add_argument("--cpus-per-task", type=int, default=default("CPUS_PER_TASK", "1"), help="CPUS_PER_TASK (1)")
    site.add_argument("--interface", default=default("INTERFACE"), help="network card between the ranks; INTERFACE")
    site.add_argument("--container", default=default("CONTAINER", ""), help="command before python; CONTAINER")
    site.add_argument("--venv", default=default("VIRTUAL_ENV"), help="virtual environment; VIRTUAL_ENV (this python)")
    site.add_argument("--preflight", default=default("PREFLIGHT", ""), help="its options, or `no`; PREFLIGHT")
    result.add_argument("arguments", nargs="*", help="evaluate, pack: behind --, what the program is given")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        check_options(options)
        if options.job == "train":
            return submit_training(options)
        if options.job == "pack":
            return submit_packing(options)
        header = header_of(options, "evaluate", ntasks=1, output=f"{make_logs(options, 'runs/logs')}/evaluate-%j.log")
        return submit(options, header, {}, options.arguments)
    except SubmitError as error:
        print(f"submit: {error}", file=sys.stderr)
        return USAGE
    except Refused as refusal:
        return refusal.code


def check_options(options: argparse.Namespace) -> None:
    """Raise SubmitError for the first option that Slurm would misread or that belongs to another job."""
    if not _TIME.fullmatch(options.time):
        raise SubmitError(f"--time {options.time}: write minutes, H:MM:SS, or D-HH, for example 24:00:00")
    for name, job in (("config", "train"), ("nodes", "train"), ("tasks", "pack")):
        given = getattr(options, name) is not None
        if given != (options.job == job):
            raise SubmitError(f"--job {options.job} {'takes no' if given else 'needs'} --{name}")
    if bool(options.arguments) == (options.job == "train"):
        needs = "takes --config and --set" if options.job == "train" else "needs the program's arguments"
        raise SubmitError(f"--job {options.job} {needs}; what stands behind -- is for evaluate and pack")
    if options.after and not re.fullmatch(r"\d+(,\d+)*", options.after):
        raise SubmitError(f"--after {options.after}: must be the number of a job")
    for name in ("gpus_per_node", "cpus_per_task", "tasks", "tasks_per_node", "warn_seconds"):
        value, least = getattr(options, name), 0 if name == "gpus_per_node" else 1
        if value is not None and value < least:
            raise SubmitError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    if options.gpus_per_node and options.tasks_per_node not in (None, options.gpus_per_node):
        raise SubmitError(f"--tasks-per-node {options.tasks_per_node}: one task is one GPU; only without GPUS")


def submit_training(options: argparse.Namespace) -> int:
    match = _NODES.fullmatch(options.nodes)
    if match is None or int(match[2] or match[1]) < int(match[1]):
        raise SubmitError(f"--nodes {options.nodes}: must be a number, or MIN-MAX")
    least, most = int(match[1]), int(match[2] or match[1])
    per_node = options.gpus_per_node or options.tasks_per_node or 1
    settings = resolved_settings(options)
    program = ["--config", options.config, *(a for override in options.overrides for a in ("--set", override))]
    program += ["--from", options.source] if options.source else []
    if not options.no_check:
        for nodes in {least, most}:
            check_training(options, program, nodes * per_node)
    run_dir = settings["run"]["dir"]
    logs = make_logs(options, f"{run_dir}/logs")
    urls = [settings["data"][key] for key in ("train_url", "validation_url")]
    preflight = [*(word for url in urls for word in ("--data-url", url)), "--mlflow-uri", settings["tracking"]["uri"]]
    if url := settings["checkpoint"]["url"]:
        preflight += ["--checkpoint-url", url]
    variables = {
        "RUN_DIR": run_dir,
        "WARN_SECONDS": str(options.warn_seconds),
        "PREFLIGHT": "no" if options.preflight == "no" else f"{shlex.join(preflight)} {options.preflight}".strip(),
        "MIN_NODES": str(least),
        "TASKS_PER_NODE": str(per_node),
        "CPUS_PER_TASK": str(options.cpus_per_task),
    }
    if options.interface:
        variables |= {"GLOO_SOCKET_IFNAME": options.interface, "NCCL_SOCKET_IFNAME": options.interface}
    header = header_of(
        options,
        settings["run"]["name"],
        nodes=options.nodes,
        cpus_per_task=per_node * options.cpus_per_task,
        signal=f"B:USR1@{options.warn_seconds}",
        output=f"{logs}/slurm-%j.log",
    )
    return submit(options, header, variables, program, link=mlflow_link(settings, run_dir))


def submit_packing(options: argparse.Namespace) -> int:
    folder = make_logs(options, f"runs/pack/{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
    array = f"0-{options.tasks - 1}"
    header = header_of(options, "pack", array=array, ntasks=1, output=f"{folder}/round-1-%a.log")
    return submit(options, header, {"PACK_DIR": folder}, options.arguments, link=f"rounds: {folder}/rounds.log")


def header_of(options: argparse.Namespace, name: str, **flags: object) -> dict[str, object]:
    """Flags of sbatch, those of the site included; later ones win over the script's own."""
    gpus = options.gpus_per_node if options.job == "train" else min(options.gpus_per_node, 1)
    return {
        "job-name": re.sub(r"[^\w.-]", "_", str(name)),
        "time": options.time,
        "partition": options.partition,
        "account": options.account,
        "exclude": options.exclude,
        "gpus-per-node": gpus if options.job != "pack" and gpus else None,
        "cpus-per-task": options.cpus_per_task,
        "dependency": options.after and "afterok:" + options.after.replace(",", ":"),
        "kill-on-invalid-dep": options.after and "yes",
        **{flag.replace("_", "-"): value for flag, value in flags.items()},
    }


def submit(
    options: argparse.Namespace,
    header: Mapping[str, object],
    variables: Mapping[str, str],
    arguments: list[str],
    link: str = "",
) -> int:
    """Print the filled-in script, or hand it to sbatch and print where to look."""
    common = {"ROOT": str(ROOT), "PYTHON": python_of(options), "CONTAINER": options.container}
    template = (ROOT / f"cluster/{options.job}.sbatch").read_text()
    script = fill(template, header, {**common, **variables}, arguments)
    if options.dry_run:
        print(script, end="")
        return 0
    # Slurm lets these win over what stands in a script; they were read as defaults above.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SBATCH_")}
    try:
        result = subprocess.run(
            ["sbatch", "--parsable"],
            input=script,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError as error:
        print(f"submit: cannot run sbatch ({error.strerror}); submit from a login node", file=sys.stderr)
        return UNAVAILABLE
    if result.returncode:
        print(f"submit: {result.stderr.strip()}", file=sys.stderr)
        return UNAVAILABLE
    job = result.stdout.strip().partition(";")[0]
    print(f"job: {job}")
    print(f"log: {str(header['output']).replace('%j', job)}")
    if link:
        print(link)
    return 0


def fill(template: str, header: Mapping[str, object], variables: Mapping[str, str], arguments: list[str]) -> str:
    """The template with our flags behind its own, then the variables, then what the program is given."""
    lines = template.splitlines(keepends=True)
    end = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH ")) + 1
    flags = []
    for flag, value in header.items():
        if value is None or value == "":
            continue
        if re.search(r"[\n\r\"'\\]", str(value)):
            raise SubmitError(f"--{flag} {value!r}: must not hold quotes, backslashes or line breaks")
        flags.append(f'#SBATCH --{flag}="{value}"\n')
    exports = [f"export {name}={shlex.quote(value)}\n" for name, value in variables.items() if value]
    return "".join([*lines[:end], *flags, "\n", *exports, f"set -- {shlex.join(arguments)}\n", *lines[end:]])


def resolved_settings(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The sections of the config, complete; raises Refused when the trainer does not understand it."""
    command = ["-m", "trainer.resolve", "--config", options.config]
    command += [argument for override in options.overrides for argument in ("--set", override)]
    result = run_python(options, command)
    sys.stderr.write(result.stderr)
    if result.returncode:
        raise Refused(result.returncode)
    settings: dict[str, dict[str, Any]] = json.loads(result.stdout)
    return settings


def check_training(options: argparse.Namespace, program: list[str], ranks: int) -> None:
    """Let the trainer check its config and data for a number of ranks; raises Refused when it finds something."""
    result = run_python(options, ["trainer/run.py", "--check", *program], WORLD_SIZE=str(ranks))
    if result.returncode:
        sys.stderr.write(result.stderr)
        raise Refused(result.returncode)


def run_python(options: argparse.Namespace, arguments: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    python = python_of(options)
    try:
        return subprocess.run(
            [python, *arguments],
            cwd=ROOT,
            env=os.environ | variables,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError as error:
        raise SubmitError(f"--venv {options.venv}: cannot run {python} ({error.strerror})") from error


def mlflow_link(settings: Mapping[str, Mapping[str, Any]], run_dir: str) -> str:
    """Where to look at the run: its page if it exists, else its experiment's, or how to serve a local store."""
    uri, experiment = settings["tracking"]["uri"], settings["tracking"]["experiment"]
    if not uri.startswith("http"):
        return f"mlflow: mlflow ui --backend-store-uri {uri}   (experiment {experiment})"
    query = urllib.parse.urlencode({"experiment_name": experiment})
    page = f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/get-by-name?{query}"
    try:
        with urllib.request.urlopen(page, timeout=SERVER_SECONDS) as answer:
            number = json.load(answer)["experiment"]["experiment_id"]
    except (OSError, ValueError, KeyError):
        return f"mlflow: {uri}   (experiment {experiment}, made when the run begins)"
    link = f"mlflow: {uri.rstrip('/')}/#/experiments/{number}"
    try:
        run = json.loads((ROOT / run_dir / "run_state.json").read_text()).get("mlflow_run_id")
    except (OSError, ValueError):
        run = None
    return f"{link}/runs/{run}" if run else link


def make_logs(options: argparse.Namespace, folder: str) -> str:
    """The full name of a folder of logs, which Slurm wants to exist."""
    path = ROOT / folder
    if "%" in str(path):
        raise SubmitError(f"the folder of the logs, {path}, must not hold %, which Slurm replaces")
    if not options.dry_run:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SubmitError(f"cannot make {path} ({error.strerror})") from error
    return str(path)


def python_of(options: argparse.Namespace) -> str:
    return f"{options.venv}/bin/python" if options.venv else sys.executable


if __name__ == "__main__":
    sys.exit(main())
