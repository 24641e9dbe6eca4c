"""A cached step must leave exactly the gradients of a direct step, and hold the activations of one micro-batch only."""

import math
import os
import socket
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from gapkernels import GapLoss
from gapkernels.gradient_cache import GradientCache

SAMPLES, WIDTH, EMBED_DIM = 24, 6, 5
# Sizes of micro-batches: even ones, uneven ones, single samples, everything at once.
PARTITIONS = [[8, 8, 8], [10, 10, 4], [1] * SAMPLES, [SAMPLES]]


def make_towers(modalities: int, *extra: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(
        nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), *(build() for build in extra), nn.Linear(16, EMBED_DIM)).to(
            dtype
        )
        for _ in range(modalities)
    )


def make_inputs(modalities: int, samples: int = SAMPLES, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(samples, WIDTH, dtype=dtype, generator=generator) for _ in range(modalities)]


def encoder_of(towers: nn.ModuleList) -> Callable[[Sequence[Tensor]], tuple[Tensor, ...]]:
    return lambda parts: tuple(tower(part) for tower, part in zip(towers, parts, strict=True))


def partition(inputs: Sequence[Tensor], sizes: Sequence[int]) -> list[tuple[Tensor, ...]]:
    return list(zip(*(x.split(list(sizes)) for x in inputs), strict=True))


def gradients(*modules: nn.Module) -> list[Tensor]:
    parameters = [parameter for module in modules for parameter in module.parameters()]
    found = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return [gradient for gradient in found if gradient is not None]


@pytest.mark.parametrize("sizes", PARTITIONS, ids=lambda sizes: "x".join(map(str, dict.fromkeys(sizes))))
@pytest.mark.parametrize("modalities", [2, 3])
def test_gradients_are_those_of_the_direct_step(modalities: int, sizes: list[int]) -> None:
    towers, inputs = make_towers(modalities), make_inputs(modalities)
    loss = GapLoss(temperature=0.2, learn_temperature=True, anchor=modalities - 1, backend="reference").double()
    encode = encoder_of(towers)

    direct_loss = loss(*encode(inputs))
    direct_loss.backward()
    direct = gradients(towers, loss)

    step = GradientCache(encode, partition(inputs, sizes))
    cached_loss = loss(*step.embeddings)
    cached_loss.backward()
    step.backward()
    cached = gradients(towers, loss)

    assert cached_loss.item() == pytest.approx(direct_loss.item(), rel=1e-12)
    assert len(cached) == len(direct) == 4 * modalities + 1  # the learned temperature is one of them
    for one, other in zip(cached, direct, strict=True):
        assert (one - other).norm() <= 1e-10 * other.norm()


def test_gradients_accumulate_like_any_backward() -> None:
    towers, inputs = make_towers(2), make_inputs(2)
    loss, micro_batches = GapLoss(), partition(inputs, [8, 8, 8])
    for _ in range(2):
        step = GradientCache(encoder_of(towers), micro_batches)
        loss(*step.embeddings).backward()
        step.backward()
    twice = gradients(towers)
    step = GradientCache(encoder_of(towers), micro_batches)
    loss(*step.embeddings).backward()
    step.backward()
    for one, other in zip(twice, gradients(towers), strict=True):
        torch.testing.assert_close(one, 2 * other)


def test_dropout_is_replayed() -> None:
    towers, inputs = make_towers(2, lambda: nn.Dropout(0.5)), make_inputs(2)
    seen: list[tuple[Tensor, ...]] = []

    def encode(parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        # Augmentation draws from the same generators as dropout.
        encoded = encoder_of(towers)([part + 0.1 * torch.randn_like(part) for part in parts])
        seen.append(tuple(z.detach() for z in encoded))
        return encoded

    micro_batches = partition(inputs, [8, 8, 8])
    torch.manual_seed(7)
    step = GradientCache(encode, micro_batches)
    loss = GapLoss()
    loss(*step.embeddings).backward()
    after_first = torch.get_rng_state()
    step.backward()
    cached = gradients(towers)
    assert torch.equal(torch.get_rng_state(), after_first)
    for first, second in zip(seen[:3], seen[3:], strict=True):
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))

    # A direct step over the same random numbers: encode the parts with a graph, in the same order.
    torch.manual_seed(7)
    parts = [encode(micro_batch) for micro_batch in micro_batches]
    loss(*(torch.cat(modality) for modality in zip(*parts, strict=True))).backward()
    for one, other in zip(cached, gradients(towers), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


def test_without_replay_dropout_would_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shows that the test above can fail: two encodings with fresh masks give other embeddings."""
    from gapkernels import gradient_cache

    monkeypatch.setattr(gradient_cache, "_set_random_state", lambda states: None)
    towers, inputs = make_towers(2, lambda: nn.Dropout(0.5)), make_inputs(2)
    seen = []

    def encode(parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        encoded = encoder_of(towers)(parts)
        seen.append(encoded[0].detach())
        return encoded

    step = GradientCache(encode, [inputs])
    GapLoss()(*step.embeddings).backward()
    with pytest.raises(RuntimeError, match="is not what it was the first time"):
        step.backward()
    assert not torch.equal(seen[0], seen[1])


class Shuffling:
    """Gives the micro-batches in another order each time, as a loader that shuffles."""

    def __init__(self, micro_batches: Sequence[Any]) -> None:
        self._micro_batches = list(micro_batches)

    def __iter__(self) -> Any:
        self._micro_batches = [*self._micro_batches[1:], self._micro_batches[0]]
        return iter(self._micro_batches)


def step_that_differs(kind: str, towers: nn.ModuleList) -> GradientCache[Any]:
    """Build a step, with a gradient for its embeddings, whose second encoding will not be the first one."""
    encode, parts = encoder_of(towers), [tuple(x.clone() for x in part) for part in partition(make_inputs(2), [10, 14])]
    generator = np.random.default_rng(0)
    calls = []

    def changed(micro_batch: Sequence[Tensor]) -> Any:
        calls.append(None)
        if kind == "input changed in place":
            micro_batch[1][3].sub_(1.0)
        if kind == "numpy":
            return encode([x + torch.from_numpy(generator.normal(size=tuple(x.shape))) for x in micro_batch])
        if kind == "fewer rows" and len(calls) == 4:
            return encode([x[1:] for x in micro_batch])
        if kind == "other number of modalities" and len(calls) == 3:
            return encode(micro_batch)[:1]
        return encode(micro_batch)

    step = GradientCache(changed, Shuffling(parts) if kind == "shuffled" else parts)
    GapLoss()(*step.embeddings).backward()
    with torch.no_grad():
        if kind == "mode":
            towers.eval()
        if kind == "weights":
            towers[1][0].weight.mul_(1.001)
        if kind == "embeddings":
            step.embeddings[1][12].mul_(1.001)
    return step


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "shuffled",
            r"micro-batch 0 was encoded into embeddings of shape \[\[14, 5\], \[14, 5\]\] the first time and \[",
        ),
        ("input changed in place", r"row 3 of `embeddings\[1\]` \(row 3 of micro-batch 0\) is not what it was"),
        ("numpy", r"row 0 of `embeddings\[0\]` \(row 0 of micro-batch 0\) is not what it was"),
        ("mode", r"row 0 of `embeddings\[0\]`"),
        ("weights", r"row 0 of `embeddings\[1\]`"),
        ("embeddings", r"row 12 of `embeddings\[1\]` \(row 2 of micro-batch 1\)"),
        (
            "fewer rows",
            r"micro-batch 1 was encoded into embeddings of shape .*14, 5.* and \[\[13, 5\], \[13, 5\]\] now",
        ),
        ("other number of modalities", r"micro-batch 0 was encoded into embeddings of shape"),
    ],
)
def test_a_second_encoding_that_differs_is_refused(kind: str, message: str) -> None:
    towers = make_towers(2, lambda: nn.Dropout(0.5))
    step = step_that_differs(kind, towers)
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match=message):
        step.backward()
    assert torch.equal(torch.get_rng_state(), before)
    if "micro-batch 0" in message or "row 0" in message:  # nothing of it has reached a gradient
        assert gradients(towers) == []


def test_micro_batches_that_are_no_list() -> None:
    towers, inputs = make_towers(2), make_inputs(2)
    expected = []
    for micro_batches in (
        partition(inputs, [8, 16]),
        (part for part in partition(inputs, [8, 16])),
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*inputs), batch_size=12),
    ):
        step = GradientCache(encoder_of(towers), micro_batches)
        GapLoss()(*step.embeddings).backward()
        step.backward()
        expected.append(gradients(towers))
    for found in expected[1:]:
        for one, other in zip(found, expected[0], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)
    with pytest.raises(TypeError, match="`micro_batches` must be a sequence of micro-batches, got int"):
        GradientCache(encoder_of(towers), 3)


@pytest.mark.parametrize("later", [-1, 1])
def test_a_loader_of_another_length_is_refused(later: int) -> None:
    class Changing:
        length = 3

        def __iter__(self) -> Any:
            parts = partition(make_inputs(2), [6] * 4)[: self.length]
            self.length += later
            return iter(parts)

    step = GradientCache(encoder_of(make_towers(2)), Changing())
    GapLoss()(*step.embeddings).backward()
    with pytest.raises(RuntimeError, match="held 3 micro-batches the first time and"):
        step.backward()


def test_an_exception_leaves_the_random_state_as_it_was() -> None:
    towers, calls = make_towers(2, lambda: nn.Dropout(0.5)), []

    def failing(parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        calls.append(None)
        if len(calls) == 4:
            raise KeyError("boom")
        return encoder_of(towers)(parts)

    step = GradientCache(failing, partition(make_inputs(2), [8, 8, 8])[:2])
    GapLoss()(*step.embeddings).backward()
    before = torch.get_rng_state()
    with pytest.raises(KeyError, match="boom"):
        step.backward()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_rounding_of_a_lower_precision_inside_is_no_difference(low: torch.dtype) -> None:
    """Without a graph these towers sum in another order, as other kernels would; what they return is float32."""
    towers, inputs = make_towers(2, dtype=low), make_inputs(2, dtype=torch.float32)

    def encode(parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        order = torch.arange(WIDTH) if torch.is_grad_enabled() else torch.arange(WIDTH).flip(0)
        found = []
        for tower, part in zip(towers, parts, strict=True):
            terms = [part[:, i, None].to(low) * tower[0].weight[:, i] for i in order.tolist()]
            found.append(tower[1:](sum(terms) + tower[0].bias).float())
        return tuple(found)

    step = GradientCache(encode, [inputs])
    GapLoss()(*step.embeddings).backward()
    step.backward()
    assert len(gradients(towers)) == 8
    strict = GradientCache(encode, [inputs], tolerance=1e-6)
    GapLoss()(*strict.embeddings).backward()
    with pytest.raises(RuntimeError, match="more than 1e-06"):
        strict.backward()
    with pytest.raises(ValueError, match="`tolerance` must be a positive number, got 0"):
        GradientCache(encode, [inputs], tolerance=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e-30, 1e30, 0.0])
def test_values_that_are_no_ordinary_numbers_are_compared(value: float) -> None:
    scale = torch.ones((), requires_grad=True)

    step = GradientCache(lambda x: [scale * x], [torch.full((2, 3), value)])
    step.embeddings[0].grad = torch.zeros(2, 3)
    step.backward()
    with torch.no_grad():
        step.embeddings[0][1, 2] = 2 * value if value and math.isfinite(value) else 7.0
    with pytest.raises(RuntimeError, match="row 1 of"):
        step.backward()


def test_autocast_gives_the_gradients_of_the_direct_step() -> None:
    towers, inputs = make_towers(2, dtype=torch.float32), make_inputs(2, dtype=torch.float32)
    loss, encode = GapLoss(), encoder_of(towers)
    micro_batches = partition(inputs, [12, 12])

    with torch.autocast("cpu", torch.bfloat16):
        parts = [encode(micro_batch) for micro_batch in micro_batches]
    embeddings = [torch.cat(modality) for modality in zip(*parts, strict=True)]
    loss(*embeddings).backward()
    direct = gradients(towers)

    # The whole step in one autocast context, whose cache of cast weights outlives each encoding.
    with torch.autocast("cpu", torch.bfloat16):
        step = GradientCache(encode, micro_batches)
        assert step.embeddings[0].dtype == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            loss(*step.embeddings).backward()
        step.backward()
    assert len(direct) == 8
    for one, other in zip(gradients(towers), direct, strict=True):
        # A bf16 sum over micro-batches is rounded elsewhere than one over the batch.
        assert (one - other).norm() <= 1e-2 * other.norm()


class LiveActivations:
    """Counts the bytes autograd holds for backward, now and at most; parameters do not count."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.now = self.peak = 0
        self._parameters = {parameter.data_ptr() for parameter in parameters}

    def pack(self, x: Tensor) -> Any:
        class Held:
            def __init__(self, value: Tensor) -> None:
                self.value = value

        held = Held(x)
        if x.data_ptr() not in self._parameters:
            size = x.numel() * x.element_size()
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(held, self._release, size)
        return held

    def _release(self, size: int) -> None:
        self.now -= size


@pytest.mark.parametrize("cached", [True, False])
def test_activations_are_those_of_one_micro_batch(cached: bool) -> None:
    def peak(samples: int) -> int:
        towers, inputs = make_towers(2), make_inputs(2, samples)
        encode, live = encoder_of(towers), LiveActivations(list(towers.parameters()))
        with torch.autograd.graph.saved_tensors_hooks(live.pack, lambda held: held.value):
            if cached:
                step = GradientCache(encode, partition(inputs, [16] * (samples // 16)))
                assert live.peak == 0
                for z in step.embeddings:
                    z.grad = torch.ones_like(z)
                step.backward()
            else:
                sum(z.sum() for z in encode(inputs)).backward()
        assert live.now == 0
        return live.peak

    assert peak(16) > 0
    assert peak(256) == (1 if cached else 16) * peak(16)


def test_batch_norm_takes_its_statistics_from_micro_batches() -> None:
    sizes = [12, 12]
    inputs = make_inputs(2)
    ghost, towers, whole = (make_towers(2, lambda: nn.BatchNorm1d(16)) for _ in range(3))
    micro_batches, loss = partition(inputs, sizes), GapLoss(backend="reference")

    parts = [encoder_of(ghost)(micro_batch) for micro_batch in micro_batches]
    loss(*(torch.cat(modality) for modality in zip(*parts, strict=True))).backward()
    loss(*encoder_of(whole)(inputs)).backward()
    step = GradientCache(encoder_of(towers), micro_batches)
    loss(*step.embeddings).backward()
    step.backward()

    cached, by_parts, at_once = gradients(towers), gradients(ghost), gradients(whole)
    for one, other in zip(cached, by_parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)
    assert any((one - other).norm() > 1e-3 * other.norm() for one, other in zip(cached, at_once, strict=True))
    # The running averages move once per encoding.
    assert [int(tower[2].num_batches_tracked) for tower in towers] == [2 * len(sizes)] * 2
    assert [int(tower[2].num_batches_tracked) for tower in ghost] == [len(sizes)] * 2


def test_a_frozen_tower_takes_no_part() -> None:
    towers, inputs = make_towers(2), make_inputs(2)
    towers[1].requires_grad_(False)
    step = GradientCache(encoder_of(towers), partition(inputs, [12, 12]))
    GapLoss()(*step.embeddings).backward()
    step.backward()
    assert all(parameter.grad is None for parameter in towers[1].parameters())
    assert gradients(towers[0])


def test_mistakes_have_messages() -> None:
    towers, inputs = make_towers(2), make_inputs(2)
    with pytest.raises(ValueError, match="at least one micro-batch"):
        GradientCache(encoder_of(towers), [])
    with pytest.raises(TypeError, match="must return a sequence of tensors, one per modality, got Tensor"):
        GradientCache(lambda part: towers[0](part), inputs)
    step = GradientCache(encoder_of(towers), [inputs])
    with pytest.raises(RuntimeError, match=r"call backward\(\) on a loss of `embeddings` first"):
        step.backward()


class BothTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.towers = make_towers(2)

    def forward(self, parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return encoder_of(self.towers)(parts)


def _ddp_worker(rank: int, world_size: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    model = nn.parallel.DistributedDataParallel(BothTowers())
    syncs = []
    model.register_comm_hook(
        None, lambda state, bucket: syncs.append(bucket.index()) or _mean(bucket.buffer(), world_size)
    )
    own = [x.chunk(world_size)[rank] for x in make_inputs(2)]
    step = GradientCache(model, partition(own, [5, 5, 2]))
    GapLoss(group=dist.group.WORLD)(*step.embeddings).backward()
    step.backward(no_sync=model.no_sync)
    assert syncs == sorted(set(syncs))  # each bucket once, not once per micro-batch
    if rank == 0:
        torch.save(gradients(model), folder + "/gradients.pt")
    dist.destroy_process_group()
    os._exit(0)  # the wrapped model holds gloo's group, whose end waits for a thread that may wait for Python


def _mean(buffer: Tensor, world_size: int) -> torch.futures.Future[Tensor]:
    work = dist.all_reduce(buffer.div_(world_size), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_distributed_processes_share_the_gradient_of_the_global_batch(tmp_path: Any) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_ddp_worker, args=(2, port, str(tmp_path)), nprocs=2)
    model = BothTowers()
    GapLoss()(*model(make_inputs(2))).backward()
    for one, other in zip(torch.load(tmp_path / "gradients.pt"), gradients(model), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-13)
