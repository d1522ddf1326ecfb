"""Tests of the C++ backend against the reference, at sizes that fill neither its tiles nor its panels, and without a compiler."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bsbr import BSBRAttention, bsbr_attention, interface, reference, streaming
from bsbr.backends import dispatch, pytorch
from bsbr.backends.cpp import build, segment
from bsbr.inputs import BSBRInputs, BSBROptions
from evals.certification.subject import randomize_zero_parameters

CHUNK = 6
OPTIONS: list[dict[str, int]] = [{}, {"chunk_overlap": 2}, {"chunk_overlap": 2 * CHUNK + 1}, {"top_k": 2, "chunk_overlap": CHUNK}]


def inputs(
    time: int,
    *,
    features: int | None = None,
    beta: bool = False,
    dim: int = 6,
    chunk: int = CHUNK,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """Inputs of 2 items with 4 query heads and 2 kv heads; heads are views of joined heads, as projections return them."""
    generator = torch.Generator().manual_seed(time)

    def heads(number: int, length: int, dim: int) -> Tensor:
        return torch.randn(2, length, number, dim, generator=generator, dtype=dtype).transpose(1, 2)

    chunks = -(-time // chunk)
    tensors = {"q": heads(4, time, dim), "k": heads(2, time, dim), "v": heads(2, time, dim)}
    tensors |= {
        "meta_query": heads(4, chunks, dim),
        "meta_key": heads(2, chunks - 1, dim),
        "gain": torch.tensor([1.0, -0.5, 2.0, 0.1], dtype=dtype),
    }
    if features:
        tensors |= {"q_features": heads(4, time, features), "k_features": heads(2, time, features)}
    if beta:
        tensors["beta"] = heads(2, time, 1).squeeze(3).sigmoid()
        if features:
            tensors["k_features"] = pytorch.unit_norm(tensors["k_features"])
    return tensors


def check(tensors: dict[str, Tensor], tolerance: float, **options: Any) -> None:
    """Compares values, with and without autograd, and all gradients with the reference, relative to the largest number."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    expected = reference.bsbr_attention(**leaves, **options)
    out = bsbr_attention(**leaves, impl="cpp", **options)
    with torch.no_grad():
        without_autograd = bsbr_attention(**tensors, impl="cpp", **options)
    upstream = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gradients, expected_gradients = (
        torch.autograd.grad((x * upstream).sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
        for x in (out, expected)
    )
    for name, a, b in zip(
        ("out", "out without autograd", *leaves),
        (out, without_autograd, *gradients),
        (expected, expected, *expected_gradients),
        strict=True,
    ):
        size = max(1.0, b.abs().max().item()) if b.numel() else 1.0
        torch.testing.assert_close(a.to(b), b, rtol=0, atol=tolerance * size, msg=lambda message, name=name: f"{name}: {message}")


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("features", [None, 3])
@pytest.mark.parametrize("beta", [False, True])
@pytest.mark.parametrize("time", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 5 * CHUNK + 2])
@pytest.mark.parametrize(("group", "threads"), [(1, 1), (3, 4)], indirect=["threads"])
@pytest.mark.usefixtures("threads")
def test_values_and_gradients_match_the_reference(
    monkeypatch: pytest.MonkeyPatch, group: int, time: int, features: int | None, beta: bool, options: dict[str, int]
) -> None:
    monkeypatch.setattr(segment, "GROUP", group)
    monkeypatch.setattr(segment, "FEW_ROWS", group)
    check(inputs(time, features=features, beta=beta), 1e-10, chunk_size=CHUNK, normalise=beta, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("chunk", "dim", "features"), [(37, 20, None), (64, 40, 24), (100, 33, 5), (16, 128, 64)])
def test_full_and_partial_tiles(chunk: int, dim: int, features: int | None, dtype: torch.dtype) -> None:
    tensors = inputs(2 * chunk + 17, features=features, dim=dim, chunk=chunk, dtype=dtype)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    check(tensors, tolerance, chunk_size=chunk, chunk_overlap=chunk // 3)
    check(inputs(2 * chunk + 17, features=features, beta=True, dim=dim, chunk=chunk, dtype=dtype), tolerance, chunk_size=chunk)


def test_more_chunks_than_one_panel_of_states() -> None:
    check(inputs(2 * 270 + 1, features=3, dim=24, chunk=2), 1e-10, chunk_size=2)


def test_any_strides_are_supported() -> None:
    tensors = inputs(3 * CHUNK + 1, features=3)
    plain = bsbr_attention(**tensors, chunk_size=CHUNK, impl="cpp")
    # Tensors without contiguous rows; then an expanded upstream gradient.
    scattered = {name: x.mT.contiguous().mT if x.dim() == 4 else x for name, x in tensors.items()}
    torch.testing.assert_close(bsbr_attention(**scattered, chunk_size=CHUNK, impl="cpp"), plain, rtol=0, atol=1e-13)
    leaf = tensors["q"].detach().requires_grad_()
    out = bsbr_attention(**(tensors | {"q": leaf}), chunk_size=CHUNK, impl="cpp")
    by_sum = torch.autograd.grad(out.sum(), leaf, retain_graph=True)[0]  # the upstream gradient is one expanded number
    assert torch.equal(by_sum, torch.autograd.grad(out, leaf, torch.ones_like(out))[0])


def test_a_result_without_contiguous_rows_is_refused() -> None:
    """`Kernels.call` copies a tensor without contiguous rows; what is written to the copy would be lost."""
    x = torch.randn(1, 2, 5, 3)
    features = torch.empty(1, 2, 4, 5).mT
    with pytest.raises(ValueError, match=r"^quadratic_features writes features in contiguous rows, got strides \(40, 20, 1, 5\)"):
        torch.ops.bsbr.quadratic_features(x, features)


def test_tensors_of_several_dtypes_are_refused() -> None:
    """The function of the first tensor's dtype would read the others as that dtype."""
    x = torch.randn(1, 2, 5, 3)
    with pytest.raises(TypeError, match=r"^quadratic_features takes tensors of one dtype, got torch.float32 and torch.float64"):
        torch.ops.bsbr.quadratic_features(x, torch.empty(1, 2, 5, 4, dtype=torch.float64))


def test_a_retrieved_state_of_zero_has_the_gradient_zero() -> None:
    """With `normalise` its factor would be a million, which float32 gradients of values do not survive."""
    tensors = inputs(3 * CHUNK, features=3, beta=True)
    tensors["v"] = torch.zeros_like(tensors["v"]).requires_grad_()
    out = bsbr_attention(**tensors, chunk_size=CHUNK, normalise=True, impl="cpp")
    alone = bsbr_attention(**tensors | {"gain": torch.zeros(4, dtype=torch.float64)}, chunk_size=CHUNK, normalise=True, impl="cpp")
    upstream = torch.randn_like(out)
    found, expected = (torch.autograd.grad(x, tensors["v"], upstream)[0] for x in (out, alone))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_softmax_of_scores_of_any_size_matches_torch() -> None:
    """The polynomial of e^x is tested over its whole range, and where the result is 0."""
    scores = torch.linspace(-120, 3, 64)
    q = torch.zeros(1, 1, 64, 16)
    q[..., -1, 0] = 4.0  # √d: the last token's scores are the keys' first numbers
    k = torch.zeros(1, 1, 64, 16)
    k[..., 0] = scores
    v = torch.eye(64)[None, None, :, :16].contiguous()
    meta = torch.zeros(1, 1, 1, 16)
    weights = torch.softmax(scores.double(), dim=0)
    for start in range(0, 64, 16):
        v = torch.eye(64)[None, None, :, start : start + 16].contiguous()
        out = bsbr_attention(q, k, v, meta, meta[:, :, :0], chunk_size=64, impl="cpp")[0, 0, -1]
        torch.testing.assert_close(out.double(), weights[start : start + 16], rtol=1e-5, atol=1e-38)


@pytest.mark.parametrize("options", [{}, {"retrieval_top_k": 3}, {"chunk_overlap": CHUNK + 1, "compression_factor": 2}], ids=str)
def test_processing_in_segments_changes_nothing(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    monkeypatch.setattr(interface, "SEGMENT", 3 * CHUNK)
    monkeypatch.setattr(streaming, "PAGE", 3)
    monkeypatch.setattr(segment, "FEW_ROWS", 1)
    torch.manual_seed(0)
    module = randomize_zero_parameters(BSBRAttention(16, 4, chunk_size=CHUNK, num_kv_heads=2, **options)).double()
    x = torch.randn(2, 11 * CHUNK + 2, 16, dtype=torch.float64)
    whole = module(x)  # with gradients, in one piece
    with torch.no_grad():
        torch.testing.assert_close(module(x), whole, rtol=0, atol=1e-10)
        _, state = module.extend_in_segments(x)
    assert [state[f"states.{page}"].shape[2] for page in range(4)] == [3, 3, 3, 2]


def test_a_later_overflow_changes_no_earlier_output() -> None:
    tensors = inputs(CHUNK, dtype=torch.float32)
    before = bsbr_attention(**tensors, chunk_size=CHUNK, impl="cpp")
    tensors["k"] = tensors["k"].clone()
    tensors["k"][:, :, -1, 0] = 3e38  # its product with a query overflows float32
    after = bsbr_attention(**tensors, chunk_size=CHUNK, impl="cpp")
    assert torch.equal(before[:, :, :-1], after[:, :, :-1])


def test_impl_selects_the_backend() -> None:
    tensors = inputs(CHUNK + 1, dtype=torch.float32)
    made, options, dropping = BSBRInputs(**tensors), BSBROptions(CHUNK), BSBROptions(CHUNK, dropout_p=0.1)
    assert dispatch.select_backend("auto", made, options) == "cpp"
    assert dispatch.select_backend("torch", made, options) == "torch"
    assert dispatch.select_backend("auto", made, dropping) == "torch"
    assert dispatch.select_backend("auto", BSBRInputs(**{name: x.bfloat16() for name, x in tensors.items()}), options) == "torch"
    with pytest.raises(
        NotImplementedError, match=r"impl='cpp' was asked for: the C\+\+ backend has no dropout; impl='torch' takes"
    ):
        dispatch.select_backend("cpp", made, dropping)
    with pytest.raises(NotImplementedError, match=r"impl='triton' was asked for: the kernels "):
        dispatch.select_backend("triton", made, options)
    with pytest.raises(ValueError, match=r"^impl must be one of auto, torch, triton, cpp, got 'cuda'$"):
        BSBRAttention(16, 4, impl="cuda")


@pytest.mark.parametrize("features", [None, 3])
@pytest.mark.parametrize("options", [{}, {"chunk_overlap": 2, "normalise": True}], ids=str)
def test_second_derivatives_match_finite_differences(features: int | None, options: dict[str, Any]) -> None:
    tensors = inputs(2 * CHUNK + 2, features=features, beta=True)
    names = [name for name in tensors if name != "gain"]
    directions = [torch.randn_like(tensors[name]) for name in names]

    def gradients(step: float, **options_of_grad: bool) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        moved = {name: tensors[name] + step * by for name, by in zip(names, directions, strict=True)}
        leaves = [x.detach().requires_grad_() for x in moved.values()]
        out = bsbr_attention(**tensors | dict(zip(names, leaves, strict=True)), chunk_size=CHUNK, impl="cpp", **options)
        return leaves, torch.autograd.grad(out.square().sum(), leaves, **options_of_grad)

    leaves, first = gradients(0, create_graph=True)
    along = sum((x * by).sum() for x, by in zip(first, directions, strict=True))
    second = torch.autograd.grad(along, leaves)
    step = 1e-5
    for exact, later, earlier in zip(second, gradients(step)[1], gradients(-step)[1], strict=True):
        torch.testing.assert_close(exact, (later - earlier) / (2 * step), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["cpp", "torch"])
def test_a_sequence_of_one_chunk_gives_every_parameter_the_gradient_zero_or_more(impl: str) -> None:
    module = BSBRAttention(16, 4, chunk_size=CHUNK, meta_projections=True, impl=impl).double()
    module(torch.randn(2, CHUNK - 1, 16, dtype=torch.float64)).sum().backward()
    assert [name for name, parameter in module.named_parameters() if parameter.grad is None] == []
    assert not module.retrieval_gain.grad.any()  # type: ignore[union-attr]


def test_the_gradient_by_a_state_exists_while_everything_else_is_frozen() -> None:
    torch.manual_seed(0)
    module = randomize_zero_parameters(BSBRAttention(16, 4, chunk_size=CHUNK)).double().requires_grad_(False)
    x = torch.randn(1, 4 * CHUNK, 16, dtype=torch.float64)
    _, state = module.extend(x[:, : 2 * CHUNK])
    page = state["states.0"].requires_grad_()
    out = module.extend(x[:, 2 * CHUNK :], state)[0].square().sum()
    (gradient,) = torch.autograd.grad(out, page)
    step = 1e-5
    by = torch.randn_like(page)
    ends = [module.extend(x[:, 2 * CHUNK :], state | {"states.0": page.detach() + s * step * by})[0] for s in (1, -1)]
    difference = (ends[0].square().sum() - ends[1].square().sum()) / (2 * step)
    torch.testing.assert_close((gradient * by).sum(), difference, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "other", [{"num_heads": 2}, {"compression_factor": 2}, {"chunk_size": CHUNK - 1}, {"num_kv_heads": 2}], ids=str
)
@pytest.mark.parametrize("time", [2 * CHUNK, 3 * CHUNK + 1])
def test_a_state_of_another_attention_is_refused(other: dict[str, int], time: int) -> None:
    x = torch.randn(1, time, 16)
    with torch.no_grad():
        _, state = BSBRAttention(16, **{"num_heads": 4, "chunk_size": CHUNK} | other).extend(x)
        with pytest.raises(ValueError, match=r"state"):
            BSBRAttention(16, 4, chunk_size=CHUNK).extend(torch.randn(1, 2 * CHUNK, 16), state)


@pytest.mark.parametrize("impl", ["cpp", "torch"])
def test_every_wrong_size_is_refused_in_one_sentence(impl: Any) -> None:
    """Each dimension of each tensor, one too long and one too short; C++ would read past the end."""
    tensors = inputs(2 * CHUNK + 2, features=3, beta=True)
    for name, tensor in tensors.items():
        for dim in range(tensor.dim()):
            for wrong in (torch.cat([tensor, tensor.narrow(dim, 0, 1)], dim), tensor.narrow(dim, 0, tensor.shape[dim] - 1)):
                if name == "meta_key" and wrong.shape[2] > tensor.shape[2]:
                    continue  # more meta keys than chunks that can be retrieved are allowed
                with pytest.raises(ValueError, match=r"^[^\n]*got [^\n]*$"):
                    bsbr_attention(**tensors | {name: wrong}, chunk_size=CHUNK, impl=impl)
    without = {name: x[..., :0] if "features" in name else x for name, x in tensors.items()}
    with pytest.raises(ValueError, match="d_r, of at least 1"):
        bsbr_attention(**without, chunk_size=CHUNK, impl=impl)


@pytest.fixture
def fresh_library() -> Iterator[None]:
    """Unloads the library before and after a test."""
    build.library.cache_clear()
    yield
    build.library.cache_clear()


@pytest.mark.usefixtures("fresh_library")
@pytest.mark.parametrize(
    ("compiler", "problem"), [("no-such-compiler", "No such file"), ("false", "false failed: it printed nothing")]
)
def test_without_a_compiler_it_warns_and_runs_the_torch_backend(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiler: str, problem: str
) -> None:
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tensors = inputs(CHUNK + 1)
    with pytest.warns(RuntimeWarning, match=rf"bsbr runs on the torch backend, several times slower: .*{problem}.*which CXX names"):
        bsbr_attention(**tensors, chunk_size=CHUNK)
    with pytest.raises(NotImplementedError, match=rf"impl='cpp' was asked for: the C\+\+ backend is not available .*{problem}"):
        bsbr_attention(**tensors, chunk_size=CHUNK, impl="cpp")
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.usefixtures("fresh_library")
def test_the_library_is_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "small.cpp"  # BSBR's own takes 10 seconds
    source.write_text('extern "C" int answer() { return 42; }')
    assert build.library(source).answer() == 42  # type: ignore[union-attr]
    (built,) = (tmp_path / "bsbr").iterdir()  # and nothing else: no temporary file is left
    written = built.stat().st_mtime_ns
    build.library.cache_clear()
    assert build.library(source).answer() == 42  # type: ignore[union-attr]
    assert built.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    "variables",
    [{}, {"HOME": "/proc/nobody"}, {"HOME": "relative"}, {"XDG_CACHE_HOME": "/proc/nobody"}, {"XDG_CACHE_HOME": __file__}],
)
def test_without_a_home_the_library_lies_in_a_private_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variables: dict[str, str]
) -> None:
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # no user is known
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = build._cache_folder("bsbr.so")
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o777 == 0o700
    assert build._cache_folder("bsbr.so") == folder
    folder.chmod(0o777)  # somebody else could put a library into it
    with pytest.raises(PermissionError, match="is not a folder of this user alone"):
        build._cache_folder("bsbr.so")
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(PermissionError, match="is not a folder of this user alone"):
        build._cache_folder("bsbr.so")


def test_a_library_in_the_home_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build._cache_folder("bsbr.so") == tmp_path / ".cache/bsbr"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the standard says to ignore
    assert build._cache_folder("bsbr.so") == tmp_path / ".cache/bsbr"
