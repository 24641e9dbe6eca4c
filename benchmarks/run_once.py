"""Run every backend of a device once, forward and backward, for tools that watch it: sanitizer and profiler.

python -m benchmarks.run_once --sizes 2x1,3x7,129x100 --dtypes float32,bfloat16
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from benchmarks.cases import GAP, INFO_NCE, Case
from benchmarks.implementations import IMPLEMENTATIONS, Unavailable, our_backends
from benchmarks.workload import embeddings, step

# Around the tile sizes of the kernels, and rows whose length no vector load divides.
ODD_SIZES = "2x1,3x7,127x64,129x100,257x65,1000x72,1025x520"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run_once", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", default=ODD_SIZES, help="N×D, comma-separated, for instance 129x100")
    parser.add_argument("--dtypes", default="float32,bfloat16,float16")
    parser.add_argument("--modalities", default="2,3")
    parser.add_argument("--losses", default=f"{GAP},{INFO_NCE}")
    parser.add_argument("--backends", default="", help="comma-separated; all that can run by default")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    names = [f"gapkernels-{name}" for name in options.backends.split(",") if name] or our_backends(device)
    cases = [
        Case(name, loss, samples, width, dtype, modalities)
        for name in names
        for samples, width in (map(int, size.split("x")) for size in options.sizes.split(","))
        for dtype in options.dtypes.split(",")
        for modalities in map(int, options.modalities.split(","))
        for loss in options.losses.split(",")
    ]
    refused = 0
    for case in cases:
        print(f"running {case.id}", flush=True)
        try:
            step(IMPLEMENTATIONS[case.implementation].function(case, device), embeddings(case, device), backward=True)
        except (TypeError, Unavailable) as error:  # a type that this backend does not take, or no such device
            refused += 1
            print(f"refused {case.id}: {error}", flush=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # what goes wrong shows where it happens
    if cases and refused == len(cases):
        raise SystemExit("every case was refused")
    print(f"{len(cases) - refused} cases on {', '.join(names)}")


if __name__ == "__main__":
    main()
