"""Tests of context parallelism: values and gradients of several gloo processes equal those of one process.

All cases with the same number of ranks run in the same processes, which write their results to files.
"""

from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from baselines.ring import RingAttention
from bsbr import BSBRAttention, bsbr_attention, reference
from bsbr.backends.pytorch import unit_norm
from bsbr.context_parallel import ContextParallel, context_parallel_bsbr_attention, sent_bytes
from bsbr.inputs import BSBRInputs, BSBROptions
from bsbr.interface import Attention
from bsbr.process_group import SequenceGroup, ring_sent_bytes, split_evenly
from evals.certification.subject import randomize_zero_parameters
from evals.isolation import forkserver

pytestmark = pytest.mark.xdist_group("parallel")
CHUNK, BATCH, HEADS, HEAD_DIM = 4, 2, 4, 6

# Lengths of shards, sizes and options, by name.
FUNCTIONS: dict[str, tuple[list[int], dict[str, int], dict[str, int]]] = {
    "two whole": ([8, 4], {}, {"normalise": True}),
    "two, an incomplete last chunk": ([8, 7], {}, {}),
    "two, one chunk and one token": ([4, 1], {}, {}),
    "two, a first rank that retrieves nothing": ([4, 14], {"kv_heads": 1}, {"chunk_overlap": 3}),
    "two, overlap longer than a shard": ([4, 12], {}, {"chunk_overlap": 6}),
    "two, a last shard shorter than the overlap": ([12, 3], {"kv_heads": 2}, {"chunk_overlap": 5}),
    "two, top_k": ([8, 10], {"feature_dim": 2}, {"top_k": 2, "normalise": True}),
    "four whole": ([4, 4, 4, 4], {"kv_heads": 1, "feature_dim": 3}, {}),
    "four unequal": ([4, 12, 4, 3], {"kv_heads": 2, "feature_dim": 2}, {"chunk_overlap": 9}),
    "four, top_k": ([8, 4, 8, 1], {}, {"top_k": 3, "chunk_overlap": 2}),
    "four, overlap longer than everything": ([4, 8, 4, 2], {}, {"chunk_overlap": 100, "top_k": 1}),
}
MODULES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "two ranks": (2, 3 * CHUNK + 2, {}),
    "two ranks, all options": (2, 5 * CHUNK, {"rotary": True, "chunk_overlap": 7, "num_kv_heads": 2, "compression_factor": 2}),
    "two ranks, one chunk each": (2, 2 * CHUNK, {"retrieval_top_k": 1, "rotary": True}),
    "four ranks": (4, 6 * CHUNK + 1, {"compression_factor": 4, "retrieval_top_k": 2}),
    "four ranks, all options": (4, 4 * CHUNK, {"rotary": True, "chunk_overlap": 6, "num_kv_heads": 1, "compression_factor": 2}),
}
RINGS: dict[str, tuple[list[int], dict[str, Any]]] = {
    "ring of two": ([5, 4], {}),
    "ring of two, unequal": ([1, 9], {"num_kv_heads": 2, "rotary": True}),
    "ring of four": ([3, 1, 6, 2], {"num_kv_heads": 1, "rotary": True}),
    "ring of four alike": ([4, 4, 4, 4], {}),
}
BAD = {"a boundary inside a chunk": [6, 6], "an empty rank": [0, 8], "an empty last rank": [8, 0]}
NAMES = ("q", "k", "v", "meta_query", "meta_key", "q_features", "k_features", "beta", "gain")


def whole(lengths: Sequence[int], kv_heads: int = HEADS, feature_dim: int = HEAD_DIM) -> dict[str, Tensor]:
    """Arguments for the whole sequence, with gradients."""
    time, generator = sum(lengths), torch.Generator().manual_seed(sum(lengths))
    chunks = -(-time // CHUNK)
    sizes = [
        *((HEADS, time, HEAD_DIM), (kv_heads, time, HEAD_DIM), (kv_heads, time, HEAD_DIM)),
        *((HEADS, chunks, HEAD_DIM), (kv_heads, chunks - 1, HEAD_DIM)),
        *((HEADS, time, feature_dim), (kv_heads, time, feature_dim)),
    ]
    tensors = [torch.randn(BATCH, *size, generator=generator, dtype=torch.float64) for size in sizes]
    tensors[6] = unit_norm(tensors[6])
    beta = torch.rand(BATCH, kv_heads, time, generator=generator, dtype=torch.float64)
    gain = torch.linspace(-1, 2, HEADS, dtype=torch.float64)
    return {name: tensor.requires_grad_() for name, tensor in zip(NAMES, [*tensors, beta, gain], strict=True)}


def cut(tensors: dict[str, Tensor], lengths: Sequence[int], rank: int) -> dict[str, Tensor]:
    """This rank's shard of the arguments."""
    start, stop = sum(lengths[:rank]), sum(lengths[: rank + 1])
    part = {name: slice(start, stop) for name in NAMES} | {
        name: slice(start // CHUNK, -(-stop // CHUNK)) for name in ("meta_query", "meta_key")
    }
    return {name: tensor if name == "gain" else tensor[:, :, part[name]] for name, tensor in tensors.items()}


def weights(like: Tensor) -> Tensor:
    """Weights of the outputs in a loss, different for every output."""
    return torch.linspace(-1, 1, like.numel(), dtype=torch.float64).view_as(like)


def module(options: dict[str, Any]) -> BSBRAttention:
    torch.manual_seed(0)
    return randomize_zero_parameters(BSBRAttention(16, 4, chunk_size=CHUNK, **options)).double()


def hidden(time: int) -> Tensor:
    return torch.randn(BATCH, time, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(time)).requires_grad_()


# --- in each rank ---------------------------------------------------------------------------------


def run_rank(_: Connection, rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=size)
    results: dict[str, Any] = {}
    for name, (lengths, sizes, options) in FUNCTIONS.items():
        if len(lengths) == size:
            results[name] = _function(rank, lengths, sizes, options)
    for name, (ranks, time, options) in MODULES.items():
        if ranks == size:
            results[name] = _module(rank, split_evenly(time, size, CHUNK), options)
    for name, (lengths, options) in RINGS.items():
        if len(lengths) == size:
            results[name] = _ring(rank, lengths, options)
    if size == 2:
        for name, lengths in BAD.items():
            results[name] = _refused(rank, lengths)
        results["float32 and bfloat16"] = [_in(dtype, rank) for dtype in (torch.float32, torch.bfloat16)]
        results["another"] = _unable(rank)
        results["data parallel"] = _data_parallel(rank)
    if size == 4:
        results["a group"] = _in_a_group(rank)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


def _function(rank: int, lengths: list[int], sizes: dict[str, int], options: dict[str, int]) -> dict[str, Any]:
    tensors, group = whole(lengths, **sizes), SequenceGroup(lengths=lengths)
    out = context_parallel_bsbr_attention(BSBRInputs(**cut(tensors, lengths, rank)), BSBROptions(CHUNK, **options), group)
    forward = group.sent_bytes
    every = weights(torch.empty(BATCH, HEADS, sum(lengths), HEAD_DIM))
    start = sum(lengths[:rank])
    (out * every[:, :, start : start + lengths[rank]]).sum().backward()
    gradients = {name: tensor.grad for name, tensor in tensors.items()}
    return {"out": out.detach(), "gradients": gradients, "sent": (forward, group.sent_bytes - forward)}


def _module(rank: int, lengths: list[int], options: dict[str, Any]) -> dict[str, Any]:
    attention, states = module(options), hidden(sum(lengths))
    parallel = ContextParallel(attention)
    start = sum(lengths[:rank])
    shard = slice(start, start + lengths[rank])
    out = parallel(states[:, shard])
    forward = parallel.group.sent_bytes
    (out * weights(states.detach())[:, shard]).sum().backward()
    gradients = {name: parameter.grad for name, parameter in attention.named_parameters()} | {"x": states.grad}
    return {"out": out.detach(), "gradients": gradients, "sent": (forward, parallel.group.sent_bytes - forward)}


def ring(options: dict[str, Any]) -> RingAttention:
    torch.manual_seed(0)
    return RingAttention(16, 4, **options).double()


def _ring(rank: int, lengths: list[int], options: dict[str, Any]) -> dict[str, Any]:
    parallel = ContextParallel(ring(options), SequenceGroup(lengths=lengths))
    shard = hidden(sum(lengths))[:, sum(lengths[:rank]) : sum(lengths[: rank + 1])]
    with pytest.raises(NotImplementedError, match="forward pass only"):
        parallel(shard)
    with torch.no_grad():
        return {"out": parallel(shard), "sent": parallel.group.sent_bytes}


def _refused(rank: int, lengths: list[int]) -> str:
    with pytest.raises(ValueError, match="shards") as refusal:
        ContextParallel(module({}))(hidden(8)[:, : lengths[rank]])
    return str(refusal.value)


def _in(dtype: torch.dtype, rank: int) -> dict[str, Any]:
    attention, states = module({"chunk_overlap": 2}).to(dtype), hidden(16).detach().to(dtype)
    parallel = ContextParallel(attention, SequenceGroup(lengths=[8, 8]))
    out = parallel(states[:, 8 * rank : 8 * rank + 8])
    sent = parallel.group.sent_bytes
    out.sum().backward()
    return {"out": out.detach(), "whole": attention(states).detach(), "sent": sent}


def _unable(rank: int) -> str:
    class Another(BSBRAttention):
        context_parallel_forward = Attention.context_parallel_forward

    with pytest.raises(NotImplementedError) as refusal:
        ContextParallel(Another(16, 4))(torch.zeros(1, 4, 16))
    return str(refusal.value)


def _data_parallel(rank: int) -> dict[str, Tensor | None]:
    attention = module(MODULES["two ranks, all options"][2])
    wrapped = DistributedDataParallel(ContextParallel(attention), process_group=dist.new_group())
    states = hidden(20).detach()
    shard = slice(0, 12) if rank == 0 else slice(12, 20)
    (2 * wrapped(states[:, shard]) * weights(states)[:, shard]).sum().backward()
    return {name: parameter.grad for name, parameter in attention.named_parameters()}


def _in_a_group(rank: int) -> Any:
    """Runs a group of two of the four processes, with other rank numbers in the group than in the world."""
    pair = dist.new_group([1, 3])
    if rank not in (1, 3):
        with pytest.raises(RuntimeError) as refusal:
            SequenceGroup(pair)
        return str(refusal.value)
    place, states = (1, 3).index(rank), hidden(10).detach()
    return ContextParallel(module({}), pair)(states[:, slice(4) if place == 0 else slice(4, 10)]).detach()


# --- results --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """The results of each rank, by case."""
    folders = {size: tmp_path_factory.mktemp(f"ranks-{size}") for size in (2, 4)}
    # Forked from a server that has imported torch once for all of them.
    started = [forkserver.launch(run_rank, rank, size, folders[size])[0] for size in folders for rank in range(size)]
    for process in started:
        process.join(timeout=120)
    assert [process.exitcode for process in started] == [0] * len(started)
    each = {size: [torch.load(folder / f"{rank}.pt") for rank in range(size)] for size, folder in folders.items()}
    return {case: [one[case] for one in ranks] for ranks in each.values() for case in ranks[0]}


def summed(each: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Gradients summed over ranks. Every rank must have a gradient for every tensor, because an all_reduce waits for all ranks."""
    return {name: torch.stack([one["gradients"][name] for one in each]).sum(0) for name in each[0]["gradients"]}


@pytest.mark.parametrize("case", FUNCTIONS)
def test_values_and_gradients_match_one_rank_and_the_reference(case: str, results: dict[str, list[Any]]) -> None:
    lengths, sizes, options = FUNCTIONS[case]
    out, gradients = torch.cat([one["out"] for one in results[case]], dim=2), summed(results[case])
    for function in (bsbr_attention, reference.bsbr_attention):
        tensors = whole(lengths, **sizes)
        expected = function(**tensors, chunk_size=CHUNK, **options)
        (expected * weights(expected.detach())).sum().backward()
        torch.testing.assert_close(out, expected.detach(), rtol=0, atol=1e-12)
        for name, tensor in tensors.items():
            torch.testing.assert_close(gradients[name], tensor.grad, rtol=0, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("case", FUNCTIONS)
def test_sent_bytes_match_the_formula(case: str, results: dict[str, list[Any]]) -> None:
    lengths, sizes, options = FUNCTIONS[case]
    shape = {"kv_heads": HEADS, "feature_dim": HEAD_DIM, **sizes, "head_dim": HEAD_DIM, "itemsize": 8, "batch_size": BATCH}
    overlap = options.get("chunk_overlap", 0)
    for rank, one in enumerate(results[case]):
        assert one["sent"] == sent_bytes(lengths, rank, chunk_size=CHUNK, chunk_overlap=overlap, **shape)


def test_sent_bytes_by_hand() -> None:
    # Two chunks of rank 0 go to ranks 1 and 2, one of rank 1 to rank 2: (3 + 1)·6 numbers of 8 bytes a chunk and head.
    shape = {"chunk_size": 4, "kv_heads": 2, "head_dim": 6, "feature_dim": 3, "itemsize": 8, "batch_size": 5}
    chunk = 5 * 2 * (3 + 1) * 6 * 8
    each = [sent_bytes([8, 4, 3], rank, **shape) for rank in range(3)]
    assert each == [(4 * chunk, 0), (chunk, 2 * chunk), (0, 3 * chunk)]
    # Overlap 5: rank 1 sees 5 tokens of rank 0; rank 2 the 4 of rank 1 and one of rank 0.
    token = 5 * 2 * 2 * 6 * 8
    each = [sent_bytes([8, 4, 3], rank, **shape, chunk_overlap=5) for rank in range(3)]
    assert each == [(4 * chunk + 6 * token, 0), (chunk + 4 * token, 2 * chunk + 5 * token), (0, 3 * chunk + 5 * token)]


@pytest.mark.parametrize("case", MODULES)
def test_a_module_across_ranks_matches_the_module_on_one(case: str, results: dict[str, list[Any]]) -> None:
    _, time, options = MODULES[case]
    attention, states = module(options), hidden(time)
    expected = attention(states)
    (expected * weights(expected.detach())).sum().backward()
    torch.testing.assert_close(torch.cat([one["out"] for one in results[case]], dim=1), expected.detach(), rtol=0, atol=1e-12)
    gradients = summed(results[case])
    for name, tensor in [*attention.named_parameters(), ("x", states)]:
        torch.testing.assert_close(gradients[name], tensor.grad, rtol=0, atol=1e-11)


def test_data_parallel_sums_the_gradients_of_the_ranks(results: dict[str, list[Any]]) -> None:
    attention, states = module(MODULES["two ranks, all options"][2]), hidden(20)
    (attention(states) * weights(states.detach())).sum().backward()
    for ranks in results["data parallel"]:
        for name, parameter in attention.named_parameters():
            torch.testing.assert_close(ranks[name], parameter.grad, rtol=0, atol=1e-11)


@pytest.mark.parametrize("case", MODULES)
def test_a_module_sends_the_bytes_of_its_function_and_shard_lengths(case: str, results: dict[str, list[Any]]) -> None:
    size, time, options = MODULES[case]
    attention = module(options)
    for rank, one in enumerate(results[case]):
        forward, backward = sent_bytes(
            split_evenly(time, size, CHUNK),
            rank,
            chunk_size=CHUNK,
            chunk_overlap=attention.chunk_overlap,
            kv_heads=attention.num_kv_heads,
            head_dim=attention.head_dim,
            feature_dim=attention.feature_dim,
            itemsize=8,
            batch_size=BATCH,
        )
        assert one["sent"] == (forward + 8 * (size - 1), backward)


@pytest.mark.parametrize("case", RINGS)
def test_ring_attention_matches_standard_attention(case: str, results: dict[str, list[Any]]) -> None:
    lengths, options = RINGS[case]
    attention = ring(options)
    out = torch.cat([one["out"] for one in results[case]], dim=1)
    torch.testing.assert_close(out, attention(hidden(sum(lengths))).detach(), rtol=0, atol=1e-12)
    for rank, one in enumerate(results[case]):
        shape = {"kv_heads": attention.num_kv_heads, "head_dim": 4, "itemsize": 8, "batch_size": BATCH}
        assert one["sent"] == ring_sent_bytes(lengths, rank, **shape)


def test_sent_bytes_of_ring_attention_match_its_paper() -> None:
    # 2·(P − 1)·(n/P)·H_kv·d numbers.
    assert [ring_sent_bytes([5] * 4, rank, kv_heads=3, head_dim=7, itemsize=2) for rank in range(4)] == [2 * 3 * 5 * 3 * 7 * 2] * 4


def test_messages_keep_their_dtype(results: dict[str, list[Any]]) -> None:
    of_types = list(zip(*results["float32 and bfloat16"], strict=True))
    for ranks, tolerance in zip(of_types, (1e-5, 2e-2), strict=True):
        out = torch.cat([one["out"] for one in ranks], dim=1)
        assert out.dtype == ranks[0]["whole"].dtype
        assert (out - ranks[0]["whole"]).float().norm() <= tolerance * ranks[0]["whole"].float().norm()
    assert [ranks[0]["sent"] for ranks in of_types] == [of_types[1][0]["sent"] * 2, of_types[1][0]["sent"]]
    assert of_types[0][1]["sent"] == 0


def test_ranks_are_those_of_the_group(results: dict[str, list[Any]]) -> None:
    first, one, other, three = results["a group"]
    torch.testing.assert_close(torch.cat([one, three], dim=1), module({})(hidden(10)).detach(), rtol=0, atol=1e-12)
    assert first == "process 0 is not in the group of ranks that it was given"
    assert other == "process 2 is not in the group of ranks that it was given"


# --- bad use --------------------------------------------------------------------------------------


def test_bad_shards_raise_the_same_message_on_every_rank(results: dict[str, list[Any]]) -> None:
    inside = "all shards but the last must be whole chunks, multiples of 4 tokens, got [6, 6]; cut the sequence where a chunk ends"
    assert results["a boundary inside a chunk"] == [inside] * 2
    for case in ("an empty rank", "an empty last rank"):
        sentence = f"every rank must hold at least one token, got shards of {BAD[case]}; use fewer ranks"
        assert results[case] == [sentence] * 2


def test_an_attention_without_context_parallelism_raises(results: dict[str, list[Any]]) -> None:
    assert results["another"] == ["Another does not run across ranks: it has no method `context_parallel_forward`"] * 2


def test_a_missing_process_group_raises() -> None:
    with pytest.raises(RuntimeError, match=r"needs a process group: start the ranks with torchrun, and call .*init_process_group"):
        ContextParallel(module({}))


@pytest.mark.parametrize(
    ("seq_len", "ranks", "lengths"), [(16, 4, [4] * 4), (17, 4, [8, 4, 4, 1]), (30, 3, [12, 12, 6]), (3, 1, [3]), (5, 2, [4, 1])]
)
def test_chunks_are_shared_evenly(seq_len: int, ranks: int, lengths: list[int]) -> None:
    assert split_evenly(seq_len, ranks, CHUNK) == lengths


def test_fewer_chunks_than_ranks_raise() -> None:
    with pytest.raises(ValueError, match="8 tokens are 2 chunks of 4, too few for 3 ranks"):
        split_evenly(8, 3, CHUNK)
