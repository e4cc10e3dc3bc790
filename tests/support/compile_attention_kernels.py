"""What does the compiler make of the attention kernels? Run as a program: one line of JSON for each kernel.

    python -m tests.support.compile_attention_kernels 90 64 bf16 causal 1    # capability 9.0, width 64; no GPU

In a process of its own, because Triton's interpreter excludes its compiler.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from models.attention.local_attention_triton import (
    FP32_TILES,
    TILES,
    Tile,
    Tiles,
    backward_kernel,
    delta_kernel,
    forward_kernel,
    gradient_of_q_kernel,
)

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
INSTRUCTIONS = ("HGMMA", "HMMA", "LDL", "STL", "UTMALDG", "UTMAREDG")
NUMBERS = {"scale": "fp32", "num_tiles": "i32", "heads": "i32", "length": "i32"}
TYPES = {**NUMBERS, "RANK": "*i32", "TILES": "*i32", "PARTNERS": "*i32"}
FP32 = {"LSE", "DELTA"}
# By kernel: what it copies or adds in its inner loop, and the side of the tile that this is.
TILED = {
    "forward_kernel": {"K": "BN", "V": "BN"},
    "backward_kernel": {"Q": "BM", "DOUT": "BM"},
    "gradient_of_q_kernel": {"K": "BN", "V": "BN"},
}


def compiled(kernel: Any, tile: Tile, capability: int, dtype: str, **constants: Any) -> dict[str, Any]:
    """Registers and stack bytes of a thread, bytes of shared memory, and counts of INSTRUCTIONS."""
    values = {"BM": tile.queries, "BN": tile.keys, **constants}
    tiled = dict(TILED.get(kernel.__name__, {})) if constants.get("TMA") else {}
    if tiled and constants.get("ADD_DQ"):
        tiled["DQ"] = "BM"
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in values:
            signature[name] = "constexpr"
        elif name in TYPES or name in FP32 or (name == "DQ" and constants.get("ADD_DQ")):
            signature[name] = TYPES.get(name, "*fp32")
        else:
            signature[name] = f"*{dtype}" if name.isupper() else "i32"
        if name in tiled:
            signature[name] = f"tensordesc<{signature[name][1:]}[1,1,{values[tiled[name]]},{values['D']}]>"
            continue
        # What the launcher finds out about pointers and strides, not about the numbers of heads and tokens.
        if signature[name] != "constexpr" and name not in NUMBERS:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(name),): value for name, value in values.items()},
        attrs=attributes,
    )
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([CUOBJDUMP, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()  # type: ignore[union-attr]
    counts = {name: len(re.findall(rf"\b{name}\b", code)) for name in INSTRUCTIONS}
    return {"registers": int(registers), "stack": int(stack), "shared": binary.metadata.shared, **counts}


def main() -> None:
    capability, width, dtype, sees, group = (
        int(sys.argv[1]),
        int(sys.argv[2]),
        sys.argv[3],
        sys.argv[4],
        int(sys.argv[5]),
    )
    window, step = {"window": (96, 1), "stride": (0, 96)}.get(sees, (0, 1))
    generation = capability // 10 if step == 1 else 8
    tiles: Tiles = TILES[generation, 64 if width <= 64 else 128] if dtype != "fp32" else FP32_TILES
    options: dict[str, Any] = {"D": width, "PRECISION": "tf32x3" if dtype == "fp32" else "tf32", "STEP": step}
    local = {**options, "GROUP": group, "CAUSAL": sees != "both sides", "WINDOW": window, "TMA": tiles.descriptors}
    for name, kernel, tile, constants in (
        ("forward", forward_kernel, tiles.forward, {}),
        ("backward", backward_kernel, tiles.backward, {"ADD_DQ": True}),
        ("backward, deterministic", backward_kernel, tiles.backward, {"ADD_DQ": False}),
        ("gradient of q", gradient_of_q_kernel, tiles.gradient_of_q, {}),
    ):
        row = {"kernel": name, "tile": tile, **compiled(kernel, tile, capability, dtype, **local, **constants)}
        print(json.dumps(row), flush=True)
    print(json.dumps({"kernel": "delta", **compiled(delta_kernel, tiles.forward, capability, dtype, **options)}))


if __name__ == "__main__":
    main()
