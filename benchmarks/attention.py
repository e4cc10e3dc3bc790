"""How fast is our local attention beside everything else that a user could call, and how does its memory grow?

    python benchmarks/attention.py --json attention.json

One command for a CPU and for one GPU (it takes the GPU if there is one). Every candidate is first compared with the
dense mask in float64 and not timed if it is wrong; then all run in turns, and every ratio is one of the same turn.

Shapes: B batch, N heads, L positions, D head width.
"""

import argparse
import importlib
import importlib.metadata
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.report import table, write_json, write_section
from models.attention.local_attention import local_attention
from models.attention.pattern import Pattern, local_1d, local_2d

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

# Largest relative error of the norm that passes: sums of fp32, and operands and results rounded to bf16.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}
MEMORY_LENGTHS = (3072, 6144, 12288, 24576)
OURS = "ours"


@dataclass(frozen=True)
class Case:
    """A pattern and the tensors it is applied to."""

    name: str
    pattern: Pattern
    query: int | tuple[int, int]
    memory: int | tuple[int, int]
    grid: tuple[int, int]
    """Rows and columns; one row in one dimension."""
    batch: int
    heads: int
    width: int
    dtype: torch.dtype

    def flops(self, pairs: int, *, forward: bool) -> int:
        """Of matrix products with unmasked pairs: 4 D a pair forward and 10 D backward."""
        return (4 if forward else 14) * self.width * pairs * self.batch * self.heads


@dataclass(frozen=True)
class Candidate:
    """A way to compute attention. `mask` [L, L] says what it should see, `pairs` how many of them count as useful."""

    name: str
    attend: Attend
    mask: Tensor
    pairs: int


@dataclass
class Measured:
    """Seconds of a candidate in each round."""

    candidate: Candidate
    error: float
    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        return [one + other for one, other in zip(self.forward, self.backward, strict=True)]

    def per_pair(self) -> list[float]:
        return [seconds / self.candidate.pairs for seconds in self.seconds]


def case_1d(name: str, length: int, query: int, memory: int, **tensors: Any) -> Case:
    return Case(name, local_1d(length, query, memory), query, memory, (1, length), **tensors)


def case_2d(name: str, grid: tuple[int, int], query: tuple[int, int], flange: tuple[int, int], **tensors: Any) -> Case:
    return Case(name, local_2d(*grid, query, flange), query, flange, grid, **tensors)


def cases(device: str) -> list[Case]:
    """CPU: the paper's window on 32 x 32 images. GPU: 64 x 64 images, the shapes of configs/imagenet64_big.yaml and the
    paper's 2D rectangle."""
    if device == "cpu":
        return [case_1d("3072", 3072, 256, 256, batch=1, heads=8, width=64, dtype=torch.float32)]
    tensors: dict[str, Any] = {"batch": 8, "heads": 16, "dtype": torch.bfloat16}
    return [
        *(case_1d(f"1d_d{width}", 12288, 512, 512, width=width, **tensors) for width in (64, 128)),
        case_1d("1d_256_d64", 12288, 256, 256, width=64, **tensors),
        *(case_2d(f"2d_d{width}", (64, 192), (8, 32), (8, 16), width=width, **tensors) for width in (64, 128)),
    ]


def builders(case: Case, device: str) -> dict[str, Callable[[], Candidate]]:
    """By name; building one raises where it does not exist here or does not know the pattern."""
    pattern, pairs = case.pattern, case.pattern.num_pairs
    stored = pattern.mask_in_storage_order().to(device)

    def local(name: str, mask: Tensor = stored, **options: Any) -> Callable[[], Candidate]:
        return lambda: Candidate(name, lambda q, k, v: local_attention(q, k, v, pattern, **options), mask, pairs)

    def dense() -> Candidate:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=stored)

        return Candidate("dense_mask", attend, stored, pairs)

    def causal() -> Candidate:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        # What a user without local attention runs: the ratio is that of the times, so its other pairs count nothing.
        return Candidate("full_causal", attend, torch.ones_like(stored).tril(), pairs)

    found = {OURS: local(OURS), "two_part": lambda: two_part(case, stored)}
    if device == "cuda":
        found |= {
            "ours_deterministic": local("ours_deterministic", deterministic=True),
            "flex": local("flex", backend="flex"),
            "fa2_window": lambda: window(case, device, "fa2_window", fa2_window),
            "fa3_window": lambda: window(case, device, "fa3_window", fa3_window),
            "fa4_window": lambda: window(case, device, "fa4_window", fa4_window),
            "natten": lambda: natten(case, stored),
        }
        if not pattern.stored_in_raster_order:
            found["flex_raster"] = lambda: flex_raster(case, device)
    return found | {"dense_mask": dense, "full_causal": causal}


def two_part(case: Case, mask: Tensor) -> Candidate:
    """Own block (causal) and memory (all of it) as two calls of the library's attention, merged by their
    log-sum-exps."""
    if case.query != case.memory or isinstance(case.query, tuple):
        raise NotImplementedError("is made for 1D with a memory of one block")
    block = case.query
    return Candidate("two_part", lambda q, k, v: TwoPart.apply(q, k, v, block), mask, case.pattern.num_pairs)


class TwoPart(torch.autograd.Function):
    """Exact also backward: both calls get the merged output and log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, block: int) -> Tensor:
        ctx.block, ctx.blocks_per_image = block, q.shape[2] // block
        folded = [TwoPart._fold(x, block) for x in (q, k, v)]
        own, own_lse, ctx.own_state = _library_forward(*folded, is_causal=True)
        past, past_lse, ctx.past_state = _library_forward(*TwoPart._past(*folded), is_causal=False)
        TwoPart._at_first_blocks(past_lse, ctx.blocks_per_image, -math.inf)
        lse = own_lse.clone()
        lse[1:] = torch.logaddexp(own_lse[1:], past_lse)
        out = own * (own_lse - lse).exp()[..., None].to(own.dtype)
        out[1:] += past * (past_lse - lse[1:]).exp()[..., None].to(past.dtype)
        ctx.save_for_backward(*folded, out, lse)
        return TwoPart._unfold(out, len(q))

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, out, lse = ctx.saved_tensors
        dout = TwoPart._fold(dout, ctx.block)
        own = _library_backward(dout, q, k, v, out, lse, ctx.own_state, is_causal=True)
        past_lse = lse[1:].clone()
        TwoPart._at_first_blocks(past_lse, ctx.blocks_per_image, math.inf)
        past = _library_backward(dout[1:], *TwoPart._past(q, k, v), out[1:], past_lse, ctx.past_state, is_causal=False)
        for total, part, where in zip(own, past, (slice(1, None), slice(-1), slice(-1)), strict=True):
            total[where] += part
        return *(TwoPart._unfold(x, len(q) // ctx.blocks_per_image) for x in own), None

    @staticmethod
    def _fold(x: Tensor, block: int) -> Tensor:
        """[B, N, L, D] -> [B * blocks, N, block, D], without a copy where heads are the inner axis."""
        return x.transpose(1, 2).unflatten(1, (-1, block)).flatten(0, 1).transpose(1, 2)

    @staticmethod
    def _unfold(x: Tensor, batch: int) -> Tensor:
        return x.transpose(1, 2).unflatten(0, (batch, -1)).flatten(1, 2).transpose(1, 2)

    @staticmethod
    def _past(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Every block but the first with the block before it, across images."""
        return q[1:], k[:-1], v[:-1]

    @staticmethod
    def _at_first_blocks(lse: Tensor, blocks_per_image: int, value: float) -> None:
        """An image's first block has no past; it met another image's last one."""
        lse[blocks_per_image - 1 :: blocks_per_image] = value


def _library_forward(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool) -> tuple[Tensor, Tensor, Any]:
    """Output, log-sum-exp [B, N, L], and what the backward call wants besides: cuDNN on a GPU."""
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal)
        return out, lse, None
    out, lse, *state, _ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, is_causal)
    return out, lse.reshape(q.shape[:3]), (lse.shape, *state)


def _library_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, state: Any, *, is_causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if state is None:
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return backward(dout, q, k, v, out, lse, 0.0, is_causal)
    shape, cum_q, cum_k, max_q, max_k, seed, offset = state
    backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
    return backward(
        dout, q, k, v, out, lse.reshape(shape), seed, offset, None, cum_q, cum_k, max_q, max_k, 0.0, is_causal
    )


def flex_raster(case: Case, device: str) -> Candidate:
    """FlexAttention as its documentation shows it: tokens in raster order, the mask as arithmetic on positions."""
    length, visible = case.pattern.length, raster_mask(case)
    mask = create_block_mask(visible, None, None, length, length, device=device, _compile=True)
    compiled = torch.compile(flex_attention, dynamic=False)
    seen = case.pattern.mask().to(device)
    return Candidate("flex_raster", lambda q, k, v: compiled(q, k, v, block_mask=mask), seen, case.pattern.num_pairs)


def raster_mask(case: Case) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Section 3.3 of the paper in two dimensions: which raster positions see each other?"""
    (query_height, query_width), (flange_height, flange_width) = case.query, case.memory  # type: ignore[misc]
    columns = case.grid[1]

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row, column, key_row, key_column = query // columns, query % columns, key // columns, key % columns
        top, left = row - row % query_height, column - column % query_width
        before = (key_row >= top - flange_height) & (key_column >= left - flange_width)
        right = left + query_width
        above = before & (key_row < top) & (key_column < right + flange_width)
        beside = before & (key_row >= top) & (key_row < top + query_height) & (key_column < left)
        own = (key_row >= top) & (key_column >= left) & (key_column < right) & (key <= query)
        return above | beside | own

    return visible


def window(case: Case, device: str, name: str, attend: Callable[[Tensor, Tensor, Tensor, int], Tensor]) -> Candidate:
    """A sliding window over the tokens, as wide as makes the same number of pairs or the next larger."""
    size, pairs = window_size(case.pattern)
    ones = torch.ones(case.pattern.length, case.pattern.length, dtype=torch.bool, device=device)
    return Candidate(name, lambda q, k, v: attend(q, k, v, size), ones.tril() & ~ones.tril(-size), pairs)


def window_size(pattern: Pattern) -> tuple[int, int]:
    """Keys of a query, itself included, and the pairs that they make."""

    def pairs_of(size: int) -> int:
        return size * (size + 1) // 2 + (pattern.length - size) * size

    size = next(size for size in range(1, pattern.length + 1) if pairs_of(size) >= pattern.num_pairs)
    return size, pairs_of(size)


def fa2_window(q: Tensor, k: Tensor, v: Tensor, size: int) -> Tensor:
    """FlashAttention-2 as it is built into torch; tokens before heads."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    forward, length = torch.ops.aten._flash_attention_forward, q.shape[1]
    out = forward(q, k, v, None, None, length, length, 0.0, True, False, window_size_left=size - 1, window_size_right=0)
    return out[0].transpose(1, 2)


def fa3_window(q: Tensor, k: Tensor, v: Tensor, size: int) -> Tensor:
    return _flash_window("flash_attn_interface", q, k, v, size)


def fa4_window(q: Tensor, k: Tensor, v: Tensor, size: int) -> Tensor:
    return _flash_window("flash_attn.cute", q, k, v, size)


def _flash_window(package: str, q: Tensor, k: Tensor, v: Tensor, size: int) -> Tensor:
    attend = importlib.import_module(package).flash_attn_func
    out = attend(*(x.transpose(1, 2) for x in (q, k, v)), causal=True, window_size=(size - 1, 0))
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


def natten(case: Case, mask: Tensor) -> Candidate:
    """Neighborhood attention whose windows move by whole blocks is block-local attention, in one dimension."""
    if case.query != case.memory or isinstance(case.query, tuple):
        raise NotImplementedError("is made for 1D with a memory of one block")
    na1d, block = importlib.import_module("natten").na1d, case.query

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        turned = (x.transpose(1, 2) for x in (q, k, v))
        return na1d(*turned, kernel_size=2 * block, stride=block, is_causal=True).transpose(1, 2)

    return Candidate("natten", attend, mask, case.pattern.num_pairs)


def inputs(case: Case, device: str) -> list[Tensor]:
    """q, k, v and the gradient of the output, [B, N, L, D] as projections give them: heads are the inner axis. Each is
    several times a GPU's cache."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (case.batch, case.pattern.length, case.heads, case.width)
    tensors = (torch.randn(shape, generator=generator, device=device).to(case.dtype) for _ in range(4))
    return [x.transpose(1, 2) for x in tensors]


def results(attend: Attend, tensors: list[Tensor]) -> list[Tensor]:
    """The output and the gradients of q, k and v."""
    leaves = [x.detach().requires_grad_() for x in tensors[:3]]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, tensors[3])]


def error_of(candidate: Candidate, tensors: list[Tensor]) -> float:
    """The largest relative error of its output and gradients, of the first and the last head, against float64."""
    actual = results(candidate.attend, tensors)

    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~candidate.mask, -math.inf)
        return scores.softmax(-1) @ v

    worst = 0.0
    for b, n in ((0, 0), (-1, -1)):
        expected = results(exact, [x[b, n].double() for x in tensors])
        for one, other in zip(actual, expected, strict=True):
            error = float((one[b, n].double() - other).norm() / other.norm())
            worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


class Clock:
    """Seconds of forward and backward passes, and of the matrix product that the shares refer to."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.on_gpu = device == "cuda"
        size = 8192 if self.on_gpu else 1024
        self.flops = 2 * size**3
        self.matrix = torch.randn(size, size, device=device, dtype=dtype)

    def matmul(self) -> float:
        begin = self._now()
        self.matrix @ self.matrix
        return self._seconds(begin, self._now())

    def attention(self, attend: Attend, tensors: list[Tensor]) -> tuple[float, float]:
        leaves = [x.detach().requires_grad_() for x in tensors[:3]]
        if self.on_gpu:
            self.matrix @ self.matrix  # so that launches wait for the GPU and not the GPU for launches
        begin = self._now()
        out = attend(*leaves)
        middle = self._now()
        torch.autograd.grad(out, leaves, tensors[3])
        end = self._now()
        return self._seconds(begin, middle), self._seconds(middle, end)

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, begin: Any, end: Any) -> float:
        if not self.on_gpu:
            return float(end - begin)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000


def measure(
    case: Case, build: dict[str, Callable[[], Candidate]], device: str, rounds: int
) -> tuple[dict[str, Measured], dict[str, str], list[float]]:
    """Every right candidate in turns; why the others are missing; seconds of the matrix product."""
    tensors = inputs(case, device)
    measured: dict[str, Measured] = {}
    missing: dict[str, str] = {}
    for name, make in build.items():
        try:
            candidate = make()
            error = error_of(candidate, tensors)
        except Exception as problem:  # noqa: BLE001  other people's code fails in any way; the table says how
            missing[name] = f"{type(problem).__name__}: {str(problem).strip().splitlines()[0] if str(problem) else ''}"
            continue
        if error > TOLERANCE[case.dtype]:
            missing[name] = f"wrong: relative error {error:.1e}"
            continue
        measured[name] = Measured(candidate, error)
    clock, matmuls = Clock(device, case.dtype), []
    for turn in range(rounds + 1):  # the first warms up
        matmul = clock.matmul()
        times = {name: clock.attention(run.candidate.attend, tensors) for name, run in measured.items()}
        if turn:
            matmuls.append(matmul / clock.flops)
            for name, (forward, backward) in times.items():
                measured[name].forward.append(forward)
                measured[name].backward.append(backward)
    return measured, missing, matmuls


def rows_and_metrics(
    case: Case, device: str, measured: dict[str, Measured], missing: dict[str, str], matmuls: list[float]
) -> tuple[list[list[str]], dict[str, float]]:
    """A row of the table for each candidate, and the numbers worth a name."""
    ours, rows, metrics = measured[OURS], [], {}
    for name, run in measured.items():
        pairs = run.candidate.pairs
        forward, whole = case.flops(pairs, forward=True), case.flops(pairs, forward=False)
        ratios = [other / one for one, other in zip(ours.per_pair(), run.per_pair(), strict=True)]
        shares = [
            statistics.median(flops * matmul / seconds for seconds, matmul in zip(times, matmuls, strict=True))
            for flops, times in ((forward, run.forward), (whole, run.seconds))
        ]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        rows.append(
            [case.name, name, *(f"{1e3 * statistics.median(x):.2f}" for x in (run.forward, run.backward))]
            + [*(f"{share:.0%}" for share in shares), f"{statistics.median(ratios):.2f} ({spread})", f"{run.error:.0e}"]
        )
        if name == OURS:
            metrics[f"{device}_forward_share_of_matmul_{case.name}"] = shares[0]
            metrics[f"{device}_share_of_matmul_{case.name}"] = shares[1]
        else:
            metrics[f"{device}_speedup_vs_{name}_{case.name}"] = statistics.median(ratios)
    rows += [[case.name, name, why, "", "", "", "", ""] for name, why in missing.items()]
    return rows, metrics


def memory_of(length: int, device: str) -> float:
    """Bytes that one forward and backward pass holds at its peak, tensors and gradients included."""
    tiny, pattern = local_1d(512, 256, 256), local_1d(length, 256, 256)

    def run(pattern: Pattern) -> None:
        generator = torch.Generator(device).manual_seed(0)
        shape = (4, 1, 8, pattern.length, 64)
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        tensors = torch.randn(shape, generator=generator, device=device, dtype=dtype)
        results(lambda q, k, v: local_attention(q, k, v, pattern), list(tensors))

    run(tiny)  # libraries start their threads and take their workspace
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(pattern)
        return float(torch.cuda.max_memory_allocated() - before)
    before = _status("VmRSS:")
    run(pattern)
    return _status("VmHWM:") - before


def _status(name: str) -> float:
    """Bytes that the kernel counts for this process."""
    return float(Path("/proc/self/status").read_text().partition(name)[2].split()[0]) * 1024


def memory_by_length(lengths: Iterable[int], device: str) -> dict[int, float]:
    """Each in a process of its own, since a process does not give its peak back."""
    command = [sys.executable, __file__, "--device", device, "--memory-of"]
    return {
        length: float(subprocess.run([*command, str(length)], check=True, capture_output=True, text=True).stdout)
        for length in lengths
    }


def exponent(values: dict[int, float]) -> float:
    """The slope of log(value) over log(length), by least squares."""
    xs, ys = [math.log(x) for x in values], [math.log(y) for y in values.values()]
    return statistics.linear_regression(xs, ys).slope


def versions() -> Iterator[str]:
    """What the numbers depend on, besides the machine."""
    for package in ("torch", "triton", "flash-attn", "flash-attn-4", "natten"):
        try:
            yield f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            continue


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure local attention beside its rivals.")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    device = options.device
    if options.memory_of:
        print(memory_of(options.memory_of, device))
        return 0
    rounds = 7 if device == "cpu" else 25
    rows: list[list[str]] = []
    metrics: dict[str, float] = {}
    details: dict[str, Any] = {}
    rates = []
    for case in cases(device):
        measured, missing, matmuls = measure(case, builders(case, device), device, rounds)
        if OURS not in measured:
            raise SystemExit(f"{case.name}: ours is not measured, {missing[OURS]}")
        more_rows, more_metrics = rows_and_metrics(case, device, measured, missing, matmuls)
        rows, metrics = rows + more_rows, metrics | more_metrics
        rates += [1 / seconds for seconds in matmuls]
        details[case.name] = {
            "missing": missing,
            "seconds": {name: {"forward": run.forward, "backward": run.backward} for name, run in measured.items()},
        }
        if options.json:  # a later case may take too long for the time one has on a GPU
            write_json(options.json, metrics, details)
        print(table(["case", "", "", "", "", "", "", ""], more_rows), file=sys.stderr, flush=True)
    memory = memory_by_length(MEMORY_LENGTHS, device)
    metrics[f"{device}_memory_exponent"] = exponent(memory)
    details["memory"] = memory
    metrics[f"{device}_matmul_tflops"] = statistics.median(rates) / 1e12
    report(device, rows, metrics, memory)
    if options.json:
        write_json(options.json, metrics, details)
    return 0


def report(device: str, rows: list[list[str]], metrics: dict[str, float], memory: dict[int, float]) -> None:
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    header = ["case", "", "forward ms", "backward ms", "forward, share of matmul", "both", "speed-up of ours"]
    text = (
        f"{date.today()}, {where}, {', '.join(versions())}; matrix products run at "
        f"{metrics[f'{device}_matmul_tflops']:.3g} TFLOP/s. Medians of turns; the share counts visible pairs only. "
        "Ratios are those of forward and backward together in the same turn (lowest to highest), for sliding windows "
        "per visible pair.\n\n"
    )
    text += table([*header, "error"], rows)
    sizes = ", ".join(f"{length}: {value / 2**20:.0f} MiB" for length, value in memory.items())
    text += f"\n\nPeak memory of forward and backward by length, 8 heads of 64: {sizes}; "
    text += f"it grows with the length to the power {metrics[f'{device}_memory_exponent']:.2f}."
    print(text)
    write_section(f"attention on {'a GPU' if device == 'cuda' else 'a CPU'}", "python benchmarks/attention.py", text)


if __name__ == "__main__":
    sys.exit(main())
