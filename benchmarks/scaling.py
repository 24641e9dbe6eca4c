"""A model of a step of InfoNCE over many GPUs: time, bytes and memory of each process, by method.

    python -m benchmarks.scaling            # the tables of docs/scaling.md
    python -m benchmarks.scaling --check benchmarks/results/FILE.json ...
    python -m benchmarks.scaling --measure 4 8192    # peak memory of each of 4 CPU processes, N = 8192

Everything about GPUs here is a PREDICTION: data-sheet figures and counts of operations and bytes, nothing measured on
one.
Two modalities, N samples in all, D dimensions, W processes with n = N/W rows each, embeddings in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

WIDTH = 512
SIZES = tuple(2**k for k in range(15, 24))
PROCESSES = (8, 64, 256, 1024)
BYTES = 2  # of a bfloat16


@dataclass(frozen=True)
class Machine:
    """A GPU and its connections, from data sheets.

    Attributes:
        flops: matrix products per second in bfloat16, dense.
        utilisation: what a fused loss is assumed to reach of it; the same for every method, which flatters the others.
        memory: bytes that the loss may take, of 80 GB.
        gpus_per_node: connected among each other by NVLink.
        node_bandwidth: bytes per second and direction of a GPU inside a node.
        network_bandwidth: likewise between nodes, one 400 Gb/s adapter for each GPU.
        latency: seconds until the first byte of a message arrives.
    """

    flops: float = 989e12
    utilisation: float = 0.6
    memory: float = 40e9
    gpus_per_node: int = 8
    node_bandwidth: float = 450e9
    network_bandwidth: float = 50e9
    latency: float = 10e-6

    def bandwidth(self, processes: int) -> float:
        """Of the slowest connection that a ring of so many processes crosses."""
        return self.node_bandwidth if processes <= self.gpus_per_node else self.network_bandwidth


@dataclass(frozen=True)
class Cost:
    """What one process does in a step.

    Attributes:
        operations: of matrix products.
        sent: bytes.
        memory: bytes beside embeddings and their gradients.
        seconds: predicted.
    """

    operations: float
    sent: float
    memory: float
    seconds: float


def gather(samples: int, width: int, processes: int, machine: Machine) -> Cost:
    """``group_mode="gather"``: columns once each way, each tile once in the whole world (forward 2, backward 6)."""
    share = samples * width * (processes - 1) / processes
    sent = 2 * BYTES * share + 2 * 2 * 8 * samples * (processes - 1) / processes
    memory = (BYTES + BYTES + 4 + BYTES) * samples * width  # gathered, as operand, products, products to be sent
    operations = 8 * samples**2 * width / processes
    return _one_after_another(operations, sent, memory, 6, processes, machine)


def ring(samples: int, width: int, processes: int, machine: Machine) -> Cost:
    """``group_mode="ring"``: columns go around twice, once with their float32 products."""
    rows = samples / processes
    operations = 8 * samples**2 * width / processes
    sent = (2 * BYTES + 4) * rows * width * (processes - 1) + 4 * rows * width
    memory = (2 * BYTES + 2 * BYTES + 3 * 4) * rows * width  # operands, columns here and coming, products
    return _beside_each_other(operations, sent, memory, 2 * processes, processes, machine)


def local_loss(samples: int, width: int, processes: int, machine: Machine) -> Cost:
    """open_clip: both modalities gathered, n×N logits for each direction (forward 4, backward 8), kept in memory."""
    share = samples * width * (processes - 1) / processes
    operations = 12 * samples**2 * width / processes
    memory = 4 * BYTES * samples * width + 12 * samples**2 / processes  # float32: two log-softmaxes, one gradient
    return _one_after_another(operations, 4 * BYTES * share, memory, 4, processes, machine)


def inf_cl(samples: int, width: int, processes: int, machine: Machine) -> Cost:
    """Inf-CL: a ring for each direction, each with sums forward (2) and both products backward (6)."""
    one = ring(samples, width, processes, machine)
    operations = 2 * one.operations
    return _beside_each_other(operations, 2 * one.sent, one.memory, 4 * processes, processes, machine)


METHODS: dict[str, Callable[[int, int, int, Machine], Cost]] = {
    "gapkernels, gather": gather,
    "gapkernels, ring": ring,
    "open_clip, gather + local loss": local_loss,
    "Inf-CL, ring": inf_cl,
}


def _one_after_another(
    operations: float, sent: float, memory: float, messages: int, processes: int, machine: Machine
) -> Cost:
    computing = operations / (machine.flops * machine.utilisation)
    return Cost(operations, sent, memory, computing + _transfer(sent, messages * (processes - 1), processes, machine))


def _beside_each_other(
    operations: float, sent: float, memory: float, messages: int, processes: int, machine: Machine
) -> Cost:
    """Half of the messages, the columns, travel while a process computes; the products of the columns do not."""
    computing = operations / (machine.flops * machine.utilisation)
    transfer = _transfer(sent, messages, processes, machine)
    return Cost(operations, sent, memory, max(computing, transfer / 2) + transfer / 2)


def _transfer(sent: float, messages: float, processes: int, machine: Machine) -> float:
    return sent / machine.bandwidth(processes) + messages * machine.latency if processes > 1 else 0.0


def largest_batch(method: str, processes: int, machine: Machine, width: int = WIDTH) -> int:
    """The largest power of two whose step fits into the memory of each process."""
    size = processes
    while METHODS[method](2 * size, width, processes, machine).memory <= machine.memory:
        size *= 2
    return size


def tables(machine: Machine | None = None) -> str:
    """The tables of docs/scaling.md, in Markdown."""
    machine = machine or Machine()
    lines = []
    for processes in PROCESSES:
        lines += ["", f"**{processes} GPUs (prediction)**", "", f"| N | {' | '.join(METHODS)} |", "|---:" * 5 + "|"]
        for samples in SIZES:
            costs = [method(samples, WIDTH, processes, machine) for method in METHODS.values()]
            cells = [_cell(cost, machine) for cost in costs]
            lines.append(f"| 2^{samples.bit_length() - 1} | {' | '.join(cells)} |")
    lines += [
        "",
        "**Largest batch that fits (prediction)**",
        "",
        f"| GPUs | {' | '.join(METHODS)} |",
        "|---:" * 5 + "|",
    ]
    for processes in PROCESSES:
        fits = [f"2^{largest_batch(name, processes, machine).bit_length() - 1}" for name in METHODS]
        lines.append(f"| {processes} | {' | '.join(fits)} |")
    return "\n".join(lines[1:]) + "\n"


def _cell(cost: Cost, machine: Machine) -> str:
    if cost.memory > machine.memory:
        return "does not fit"
    return f"{_scaled(cost.seconds, 's')}, {_scaled(cost.sent, 'B')}, {_scaled(cost.memory, 'B')}"


def _scaled(value: float, unit: str) -> str:
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""), (1e-3, "m")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value * 1e6:.3g} µ{unit}"


def check(paths: Sequence[Path]) -> str:
    """The compute term against single-process measurements: the rate of the middle N predicts the others'."""
    lines = ["| device | type | loss | N | measured | predicted | ratio |", "|---|---|---|---:|---:|---:|---:|"]
    for path in paths:
        rows: dict[tuple[str, str, str], dict[int, tuple[float, float]]] = {}
        for entry in json.loads(path.read_text(encoding="utf-8"))["benchmarks"]:
            info = entry["extra_info"]
            if info["implementation"] != "gapkernels-cpu" or not info["backward"] or info["width"] != WIDTH:
                continue
            key = info["device"], info["dtype"], info["loss"]
            rows.setdefault(key, {})[info["samples"]] = info["operations"], info["median"]
        for (device, dtype, loss), by_size in sorted(rows.items()):
            sizes = sorted(by_size)
            middle = sizes[len(sizes) // 2]
            rate = by_size[middle][0] / by_size[middle][1]
            for size in sizes:
                operations, measured = by_size[size]
                if size != middle:
                    predicted = operations / rate
                    times = f"{_scaled(measured, 's')} | {_scaled(predicted, 's')} | {measured / predicted:.2f}"
                    lines.append(f"| {device} | {dtype} | {loss} | {size} | {times} |")
    return "\n".join(lines) + "\n"


def _measure_process(rank: int, processes: int, samples: int, port: int) -> None:
    import torch
    import torch.distributed as dist

    from gapkernels import gap_loss

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=processes)
    for mode in ("ring", "gather"):
        leaves = [torch.randn(samples // processes, WIDTH, requires_grad=True) for _ in range(2)]
        small = [torch.randn(64, WIDTH, requires_grad=True) for _ in range(2)]
        gap_loss(*small, group="world", group_mode=mode).backward()  # buffers of the libraries
        clear = Path("/proc/self/clear_refs")
        clear.write_text("5", encoding="utf-8")
        before = _peak()
        gap_loss(*leaves, group="world", group_mode=mode).backward()
        peaks: list[float] = [0.0] * processes
        dist.all_gather_object(peaks, _peak() - before)
        if rank == 0:
            print(f"{mode}: {', '.join(f'{peak:.0f} MiB' for peak in peaks)}")
    dist.destroy_process_group()


def _peak() -> float:
    """The most memory that this process has had since the last look at the counter, in MiB; Linux only."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def measure(processes: int, samples: int) -> None:
    """Print the peak memory of each process over a step of all terms in float32, gradients included, by mode."""
    import socket

    import torch.multiprocessing as mp

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_measure_process, args=(processes, samples, port), nprocs=processes)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables, or the check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", type=Path, nargs="+", metavar="FILE", help="result files of the benchmarks")
    parser.add_argument("--measure", type=int, nargs=2, metavar=("W", "N"), help="peak memory of CPU processes")
    options = parser.parse_args(arguments)
    if options.measure:
        measure(*options.measure)
        return
    print(check(options.check) if options.check else tables(), end="")


if __name__ == "__main__":
    main()
