"""The native code for the CPU: how it is compiled, found and done without."""

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adversarial import Case, random_grads, run
from flat import cpu_attention, reference_attention

import longreach.ops.cpu.native as native
from longreach import alibi_slopes
from longreach.ops.cpu import passes
from longreach.ops.lse_bound import ROUNDING
from longreach.ops.near_reach import largest_excess
from longreach.ops.processor import CPU

ROOT = Path(__file__).parents[2]


@pytest.fixture
def build(tmp_path, monkeypatch):
    """hatch_build.py, which compiles copies of the sources."""
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for source in module.FOLDER.glob("*.[ch]"):
        shutil.copy(source, tmp_path)
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    return module


def test_the_sources_compile_without_a_warning(build, capfd):
    before = set(build.FOLDER.iterdir())
    made = build.compile_tiles()
    assert sorted(path.name for path in made) == ["tiles-avx2.so", "tiles-avx512.so", "units-amx.so"]
    assert capfd.readouterr().err == ""
    assert set(build.FOLDER.iterdir()) == before | set(made)


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler"])
def test_without_a_compiler_nothing_is_built_and_nothing_fails(compiler, build, capfd, monkeypatch):
    """Nor is what another source was compiled to left there."""
    monkeypatch.setenv("CC", compiler)
    before = set(build.FOLDER.iterdir())
    (build.FOLDER / "tiles-avx2.so").write_bytes(b"of before")
    assert build.compile_tiles() == []
    assert "tiles-avx2 is not compiled" in capfd.readouterr().err
    assert set(build.FOLDER.iterdir()) == before


@pytest.fixture
def found_in(monkeypatch):
    """What library is found in a folder, looked for there instead of in that of the package."""

    def found_in(folder):
        monkeypatch.setattr(native, "__file__", str(folder / "native.py"))
        native.library.cache_clear()
        return native.library(torch.float32)

    yield found_in
    native.library.cache_clear()


NAME = f"tiles-{torch.backends.cpu.get_cpu_capability().lower()}.so"
FACTS = native._FACTS[torch.float32]


@pytest.mark.parametrize("content", [None, b"", b"no library"])
def test_what_is_no_library_is_not_used(content, found_in, tmp_path):
    if content is not None:
        (tmp_path / NAME).write_bytes(content)
    assert found_in(tmp_path) is None


@pytest.mark.parametrize(
    ("facts", "is_used"),
    [
        (FACTS, True),
        (FACTS | {"size_of_head": FACTS["size_of_head"] + 8}, False),
        (FACTS | {"most_rows": 64}, False),
        (FACTS | {"size_of_block": FACTS["size_of_block"] - 8}, False),
        (FACTS | {"size_of_step": FACTS["size_of_step"] - 8}, False),
        (FACTS | {"size_of_near": FACTS["size_of_near"] - 8}, False),
        ({"size_of_head": FACTS["size_of_head"], "most_rows": 128}, False),
    ],
)
def test_a_library_of_another_version_is_not_used(facts, is_used, found_in, tmp_path):
    """Told by what it says of itself."""
    functions = facts | {"attend": 0, "differentiate": 0, "decode": 0, "near": 0}
    source = tmp_path / "other.c"
    source.write_text("".join(f"long longreach_{name}(void) {{ return {x}; }}" for name, x in functions.items()))
    subprocess.run(["gcc", "-shared", "-fPIC", source, "-o", tmp_path / NAME], check=True)
    assert (found_in(tmp_path) is not None) == is_used


EXCHANGE = b"dlpack_exchange_api"


@pytest.mark.parametrize(
    ("major", "name", "is_used"),
    [(1, EXCHANGE, True), (2, EXCHANGE, False), (1, b"another", False), (None, None, False)],
)
def test_a_pytorch_of_another_dlpack_is_not_asked(major, name, is_used, found_in, monkeypatch):
    """Then nothing could describe tensors to C, and there is no native code."""
    make = ctypes.pythonapi.PyCapsule_New
    make.argtypes, make.restype = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p), ctypes.py_object
    exchange = native._Exchange(major=major or 0, describe=1)
    capsule = None if major is None else make(ctypes.addressof(exchange), name, None)
    monkeypatch.setattr(torch.Tensor, "__dlpack_c_exchange_api__", capsule)
    native._describer.cache_clear()
    try:
        assert (found_in(Path(native.__file__).parent) is not None) == is_used
    finally:
        native._describer.cache_clear()


def test_units_are_for_bfloat16_where_there_are_some():
    assert native.library(torch.float16) is None
    assert native.library(torch.float64) is None
    assert (native.library(torch.bfloat16) is not None) == (CPU == "AMX")


def test_without_the_library_attention_is_the_same(tmp_path):
    """In a process that finds none, to which tests in this one have given it by then."""
    package = tmp_path / "longreach"
    shutil.copytree(ROOT / "src/longreach", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    code = """
import torch
from longreach import alibi_slopes, attention
import longreach.ops.cpu.native as native, longreach.ops.cpu.onednn as onednn, longreach.ops.cpu.passes as passes
from longreach.ops.crossovers import CROSSOVERS, ROW
from longreach.ops.processor import CPU
assert ROW == f"{CPU}{', oneDNN' if onednn.IS_FAST else ''}, not compiled" and ROW in CROSSOVERS
assert native.library(torch.float32) is None
assert not (passes.HAS_NATIVE or passes.NATIVE_IS_FASTER or passes.HAS_UNITS)
torch.manual_seed(0)
q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 4, 600, 32))
expected, actual = (attention(q, k, v, slopes=alibi_slopes(4), impl=impl) for impl in ("reference", "cpu"))
torch.testing.assert_close(actual, expected)
of_expected, of_actual = (torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (expected, actual))
torch.testing.assert_close(of_actual, of_expected, rtol=1e-4, atol=1e-5)
"""
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(tmp_path)}, check=True)


@pytest.mark.parametrize("flushed", [False, True])
def test_the_caller_s_denormals_are_as_before(flushed):
    torch.set_flush_denormal(flushed)
    tensors, options = Case().inputs(torch.float32)
    run(cpu_attention, tensors, options, random_grads(tensors))
    product = torch.full((1,), 1e-30) * torch.full((1,), 1e-10)
    assert product.item() == (0.0 if flushed else pytest.approx(1e-40, rel=1e-3))


def test_weights_below_the_normal_numbers_are_none():
    q, k = torch.zeros(2, 1, 1, 300, 8)
    v = torch.randn(1, 1, 300, 8)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, _ = cpu_attention(*leaves, slopes=torch.tensor([0.5]), tolerance=0.0)
    last = torch.zeros_like(out)
    last[:, :, -1] = 1.0
    of_v = torch.autograd.grad(out, leaves, last)[2][0, 0, :, 0]
    assert (of_v[:120] == 0.0).all()
    assert of_v[140] > 0.0
    golden, _ = reference_attention(*(x.detach().double() for x in leaves), slopes=torch.tensor([0.5]))
    torch.testing.assert_close(out, golden.float())


@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_none_in_the_output(where, value):
    """In the rows that have it by the definition, and in none before its block of 64 keys."""
    tensors, options = Case().inputs(torch.float32)
    tensors["qkv".index(where)][0, 0, 100, 3] = value
    expected, actual = (f(*tensors, **options)[0].isfinite() for f in (reference_attention, cpu_attention))
    assert not expected.all()
    assert not (actual & ~expected)[:, :, 100:].any()
    assert actual[:, :, :64].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-4, 1.0, 100.0])
@pytest.mark.parametrize(("queries", "keys", "head_dim"), [(1, 1, 1), (300, 300, 64), (130, 515, 33), (257, 260, 5)])
def test_excess_is_above_any_score_less_that_of_the_own_key(queries, keys, head_dim, size, dtype):
    generator = torch.Generator().manual_seed(queries)
    q = (torch.randn(2, queries, 4, head_dim, generator=generator) * size).to(dtype).transpose(1, 2)
    k = (torch.randn(2, 2, keys, 2 * head_dim, generator=generator) + 3).to(dtype)[..., :head_dim]
    excess, *_ = native.near_reach_of(q, k, (torch.ones(4), torch.ones(4)), True, 0.3, 2**-24, 128, 64)
    scores = q.double() @ k.double().repeat_interleave(2, dim=1).transpose(2, 3) * 0.3
    own = scores.diagonal(offset=keys - queries, dim1=2, dim2=3)
    above = scores.amax(dim=-1) - own  # (B, H, Tq)
    blocks = above.split(128, dim=2)
    assert excess.shape == (2, 4, len(blocks))
    for block, bound in zip(blocks, excess.unbind(dim=2), strict=True):
        assert (bound >= block.amax(dim=-1)).all()
    torch.testing.assert_close(excess, largest_excess(q, k, 0.3, 128), rtol=8 * ROUNDING, atol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_threads_bound_the_same(causal):
    q, k = torch.randn(2, 6, 700, 40), torch.randn(2, 3, 700, 40)
    slopes = alibi_slopes(6), alibi_slopes(6).flip(0).expand(2, 6)
    alone = native.near_reach_of(q, k, slopes, causal, 0.2, 2**-24, 128, 64)
    torch.set_num_threads(4)
    try:
        for x, y in zip(native.near_reach_of(q, k, slopes, causal, 0.2, 2**-24, 128, 64), alone, strict=True):
            assert torch.equal(x, y)
    finally:
        torch.set_num_threads(1)


def test_native_code_bounds_what_it_computes(monkeypatch):
    """And nothing bounds in float32 what is computed in float64."""
    asked, near_ranges = [], native.near_ranges

    def watched(q, *arguments, **options):
        asked.append(q.dtype)
        return near_ranges(q, *arguments, **options)

    monkeypatch.setattr(native, "near_ranges", watched)
    monkeypatch.setattr(passes, "NATIVE_IS_FASTER", True)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        q, k, v = torch.randn(3, 1, 4, 2048, 32).to(dtype)
        cpu_attention(q, k, v, slopes=torch.full((4,), 0.5))
    assert asked == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("borders", [[0, 100, 500], [-5, 100, 300], [0, 100, 200], [50, 100, 300], [0, 200, 100, 300]])
@pytest.mark.parametrize("causal", [True, False])
def test_borders_that_nobody_looked_at_lead_nowhere_else(borders, causal, monkeypatch):
    """As in a compiled program: what they hold is wrong, but written and read is what the tensors have."""
    monkeypatch.setattr(passes, "NATIVE_IS_FASTER", True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        room = torch.full((3, 4, 900, 16), 3.0)
        q, k, v = room[1:2, :, 300:600].expand(3, 1, 4, 300, 16).unbind()
        (q,) = (x.clone().requires_grad_() for x in (q,))
        out, lse = cpu_attention(q, k, v, slopes=torch.full((4,), 0.5), causal=causal, cu_seqlens=torch.tensor(borders))
        torch.autograd.grad(out.sum(), q)
    finally:
        torch.use_deterministic_algorithms(False)
    assert out.shape == q.shape
    assert not lse.isnan().any()
    assert (room == 3.0).all()


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_tiles_of_what_is_negated_later(name, monkeypatch):
    monkeypatch.setattr(passes, "NATIVE_IS_FASTER", True)
    given = dict(zip("qkv", torch.randn(3, 1, 4, 300, 16), strict=True))
    expected, _ = cpu_attention(*given.values(), slopes=torch.full((4,), 0.5))
    given[name] = torch._neg_view(-given[name])
    assert given[name].is_neg()
    actual, _ = cpu_attention(*given.values(), slopes=torch.full((4,), 0.5))
    assert torch.equal(actual, expected)
