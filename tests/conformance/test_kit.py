import dataclasses
import math

import pytest
import torch

from longreach.conformance import (
    DIALECTS,
    Case,
    Dialect,
    Report,
    check_alibi,
    check_attention,
    check_bias,
    check_shards,
    check_slopes,
    golden_attention,
    golden_bias,
    golden_slopes,
)
from longreach.ops.alibi import alibi_bias, alibi_distance, alibi_slopes
from longreach.ops.attention import attention

FEW_HEADS = {"head_counts": (4, 6), "length": 80}


def ours(q, k, v, key_padding_mask, slopes=None, **options):
    slopes = alibi_slopes(q.shape[1]) if slopes is None else slopes
    return attention(q, k, v, slopes=slopes, key_padding_mask=key_padding_mask, impl="reference", **options)


def by_hand(q, k, v, key_padding_mask, *, bias, scale=None, causal=True):
    """Attention as a plain formula, with a bias of the caller's."""
    scores = q @ k.transpose(-2, -1) * (scale or q.shape[-1] ** -0.5) + bias
    hidden = torch.zeros(scores.shape[-2:], dtype=torch.bool)
    if causal:
        hidden = torch.ones_like(hidden).triu(k.shape[2] - q.shape[2] + 1)
    if key_padding_mask is not None:
        hidden = hidden | key_padding_mask[:, None, None]
    return scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1) @ v


def diagnoses(report):
    return {case.diagnosis for case in report.failures}


# What is right passes.


@pytest.mark.parametrize("num_heads", [1, 2, 3, 5, 8, 12, 20, 71, 112, 128])
def test_golden_slopes_are_the_rule_in_exact_roots(num_heads):
    power = 2 ** int(math.log2(num_heads))
    whole = golden_slopes(power)
    assert golden_slopes(num_heads)[:power].tolist() == whole.tolist()
    # The slope of rank r, to the power p, is exactly 2^(-8 (r + 1)); those appended lie half a rank earlier.
    ranks = torch.arange(1, power + 1, dtype=torch.float64)
    torch.testing.assert_close(whole**power, torch.exp2(-8 * ranks), rtol=1e-13, atol=0)
    appended = golden_slopes(num_heads)[power:]
    torch.testing.assert_close(appended, whole[: len(appended)] * 2 ** (4 / power), rtol=1e-15, atol=0)


def test_golden_bias_is_written_out_for_one_head():
    slope = 2.0**-8
    assert (golden_bias(1, 2, 3)[0, 0] / slope).tolist() == [[-1, 0, -1], [-2, -1, 0]]
    padding = torch.tensor([[True, False, False]])
    assert (golden_bias(1, 1, 3, padding, DIALECTS["bloom"])[0, 0] / slope).tolist()[0][1:] == [0, 1]
    assert (golden_bias(1, 1, 3, None, DIALECTS["mpt"])[0, 0] / slope).tolist() == [[-2, -1, 0]]
    coarse = golden_bias(12, 1, 1000, None, DIALECTS["bloom-bf16"])[0, 0, 0]
    assert len(set(coarse[-16:].tolist())) < 16 < len(set(golden_bias(12, 1, 1000)[0, 0, 0].tolist()))


def test_golden_attention_is_the_formula():
    q, k, v = (torch.randn(1, 3, 5, 4, dtype=torch.float64) for _ in range(3))
    bias = golden_bias(3, 5, 5)
    torch.testing.assert_close(golden_attention(q, k, v), by_hand(q, k, v, None, bias=bias))
    falcon = dataclasses.replace(DIALECTS["falcon"], factors_dtype=None)
    torch.testing.assert_close(golden_attention(q, k, v, None, falcon), by_hand(q, k, v, None, bias=bias / 2))
    torch.testing.assert_close(
        golden_attention(q, k, v, None, DIALECTS["btlm"]), by_hand(q, k, v, None, bias=bias, scale=0.25)
    )
    torch.testing.assert_close(
        golden_attention(q, k, v, None, DIALECTS["encoder"]), by_hand(q, k, v, None, bias=bias, causal=False)
    )


def test_this_package_passes():
    report = check_alibi(
        ours,
        slopes=alibi_slopes,
        shard_slopes=lambda heads, rank, world: alibi_slopes(heads).chunk(world)[rank],
        bias=lambda heads, queries, keys, padding: alibi_bias(alibi_slopes(heads), queries, keys),
    )
    report.raise_if_failed()
    assert report.passed
    assert not report.failures
    assert {case.outcome for case in report.cases} == {"passed"}
    for asked in (
        "128 heads",
        "rank 7 of 8",
        "bias",
        "attention",
        "decoding",
        "chunk",
        "left",
        "right",
        "600",
        "grouped",
    ):
        assert any(asked in case.name for case in report.cases)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_this_package_passes_in_low_precision(dtype):
    check_attention(ours, dtype=dtype, length=300).raise_if_failed()


@pytest.mark.parametrize(
    ("dialect", "options"),
    [
        ("bloom", lambda q: {}),
        ("mpt", lambda q: {}),
        ("btlm", lambda q: {"scale": 1 / q.shape[3]}),
        ("encoder", lambda q: {"causal": False}),
    ],
)
def test_each_dialect_has_attention_that_passes_only_there(dialect, options):
    def fn(q, k, v, padding):
        return ours(q, k, v, padding, **options(q))

    check_attention(fn, dialect=DIALECTS[dialect], **FEW_HEADS).raise_if_failed()
    assert check_attention(fn, **FEW_HEADS).passed == (dialect in ("bloom", "mpt"))


def absolute_bias(dtype):
    """BLOOM's builder."""

    def bias(heads, queries, keys, padding):
        tokens = torch.ones(1, keys) if padding is None else (~padding).float()
        positions = (tokens.cumsum(-1) - 1) * tokens
        return (alibi_slopes(heads)[:, None, None] * positions[:, None, None]).to(dtype)

    return bias


@pytest.mark.parametrize(
    ("dialect", "dtype"), [("bloom", torch.float32), ("bloom-bf16", torch.bfloat16), ("bloom-fp16", torch.float16)]
)
def test_an_absolute_bias_passes_in_its_dialect_alone(dialect, dtype):
    check_bias(absolute_bias(dtype), dialect=DIALECTS[dialect]).raise_if_failed()
    assert not check_bias(absolute_bias(dtype), length=100).passed
    other = "bloom-fp16" if dialect == "bloom-bf16" else "bloom-bf16"
    assert not check_bias(absolute_bias(dtype), dialect=DIALECTS[other], length=100).passed


def test_falcons_bias_is_rounded_twice():
    def bias(heads, queries, keys, padding):
        tokens = torch.ones(1, keys).long() if padding is None else (~padding).long()
        positions = (tokens.cumsum(-1) - 1) * tokens
        return alibi_slopes(heads)[:, None, None].bfloat16() * positions[:, None, None]

    check_bias(bias, dialect=DIALECTS["falcon"]).raise_if_failed()
    assert not check_bias(absolute_bias(torch.bfloat16), dialect=DIALECTS["falcon"], length=300).passed


# What is wrong fails, and is told apart.


@pytest.mark.parametrize(
    ("slopes", "diagnosis"),
    [
        (lambda heads: [2 ** (-8 * (head + 1) / heads) for head in range(heads)], "closed-form"),
        (lambda heads: alibi_slopes(heads).sort(descending=True).values, "in falling order"),
        (lambda heads: alibi_slopes(heads).sort().values, "in rising order"),
        (lambda heads: alibi_slopes(heads).flip(0), "backwards"),
        (lambda heads: alibi_slopes(2 ** math.ceil(math.log2(heads)))[:heads], "cut short"),
        (lambda heads: torch.cat((alibi_slopes(8), alibi_slopes(16)[: heads - 8])), "not every other one"),
        (lambda heads: alibi_slopes(heads) * 2, "begin at 0"),
        (lambda heads: [2 ** -(head + 1) for head in range(heads)], "2^-h at any number"),
        (lambda heads: -alibi_slopes(heads), "negative"),
        (lambda heads: alibi_slopes(heads).bfloat16(), "rounded to bfloat16"),
        (lambda heads: alibi_slopes(heads) * 1.3, "no known mistake"),
        (lambda heads: alibi_slopes(8), r"gives shape (8,), not (12,)"),
        (lambda heads: torch.full((heads,), math.nan), "NaN or infinity"),
        (lambda heads: 1 / 0, "raises ZeroDivisionError: division by zero"),
    ],
)
def test_wrong_slopes_at_12_heads(slopes, diagnosis):
    (case,) = check_slopes(slopes, head_counts=[12]).cases
    assert case.outcome == "failed"
    assert diagnosis in case.diagnosis
    assert case.error > case.tolerance


def test_what_is_explained_in_part_is_said_with_care():
    (case,) = check_slopes(lambda heads: alibi_slopes(heads) * 1.7, head_counts=[12]).cases
    assert case.diagnosis == "perhaps exponents that begin at 0"


def test_slopes_in_float16_are_told_from_bfloat16_where_they_differ():
    report = check_slopes(lambda heads: alibi_slopes(heads).half(), head_counts=[12, 40])
    assert diagnoses(report) == {"slopes rounded to float16"}
    assert len(report.failures) == 2


def test_slopes_right_at_powers_of_two_only():
    report = check_slopes(lambda heads: [2 ** (-8 * (head + 1) / heads) for head in range(heads)])
    passed = [case.name for case in report.cases if case.outcome == "passed"]
    assert passed == [f"slopes of {2**k} heads" for k in range(8)]
    assert len(report.failures) == 120


@pytest.mark.parametrize(
    ("shard", "diagnosis"),
    [
        (lambda heads, rank, world: alibi_slopes(heads // world), "the shard's own number of heads"),
        (lambda heads, rank, world: alibi_slopes(heads)[: heads // world], "slopes of rank 0"),
        (lambda heads, rank, world: alibi_slopes(heads)[rank::world], "dealt out in turn"),
        (lambda heads, rank, world: alibi_slopes(heads), "gives shape"),
    ],
)
def test_wrong_shards(shard, diagnosis):
    report = check_shards(shard)
    assert all(diagnosis in words for words in diagnoses(report))
    assert len(report.failures) > len(report.cases) / 2


def top_left(queries, keys):
    return torch.arange(queries)[:, None] - torch.arange(keys)


@pytest.mark.parametrize(
    ("bias", "diagnosis"),
    [
        (lambda slopes, queries, keys: 0 * slopes, "the bias is missing"),
        (lambda slopes, queries, keys: -2 * slopes * alibi_distance(queries, keys).abs(), "added twice"),
        (lambda slopes, queries, keys: slopes * alibi_distance(queries, keys).abs(), "the wrong sign"),
        (lambda slopes, queries, keys: -slopes * top_left(queries, keys).abs(), "aligned with the first keys"),
        (lambda slopes, queries, keys: slopes * torch.arange(1 - keys, 1), "absolute positions from the last key"),
        (lambda slopes, queries, keys: slopes.flip(0) * -alibi_distance(queries, keys).abs(), "slopes backwards"),
        (
            lambda slopes, queries, keys: (-slopes * alibi_distance(queries, keys).abs()).bfloat16(),
            "made from distances, is rounded to bfloat16",
        ),
    ],
)
def test_wrong_biases(bias, diagnosis):
    report = check_bias(lambda heads, tq, tk, padding: bias(alibi_slopes(heads)[:, None, None], tq, tk), length=80)
    assert not report.passed
    assert all(diagnosis in words for words in diagnoses(report)), diagnoses(report)


def test_an_absolute_bias_is_not_the_relative_one():
    report = check_bias(absolute_bias(torch.float32), length=80)
    assert diagnoses(report) == {"the bias is made from absolute positions from the first key and not rounded"}


def test_a_bias_that_hides_what_is_visible():
    report = check_bias(lambda heads, tq, tk, padding: torch.full((heads, tq, tk), -math.inf), head_counts=[4])
    assert diagnoses(report) == {"NaN or infinity where there should be numbers"}


def test_what_a_bias_holds_at_hidden_places_is_not_looked_at():
    def bias(heads, queries, keys, padding):
        exact = alibi_bias(alibi_slopes(heads), queries, keys)
        hidden = alibi_distance(queries, keys) < 0
        return exact.masked_fill(hidden if padding is None else hidden | padding[:, None, None], -math.inf)

    check_bias(bias, head_counts=[4]).raise_if_failed()


def signed_bias(q, k):
    return -alibi_slopes(q.shape[1])[:, None, None] * alibi_distance(q.shape[2], k.shape[2])


def first_keys(q, k, v, padding):
    count = q.shape[2]
    return ours(q, k[:, :, :count], v[:, :, :count], None if padding is None else padding[:, :count])


def grouped_slopes(q, k, v, padding):
    group = q.shape[1] // k.shape[1]
    return ours(q, k, v, padding, slopes=alibi_slopes(k.shape[1]).repeat_interleave(group))


def without_slopes(q, k, v, padding, **options):
    return ours(q, k, v, padding, slopes=torch.zeros(q.shape[1]), **options)


WRONG_ATTENTION = {
    "the bias is missing": without_slopes,
    "the bias is added twice": lambda q, k, v, padding: ours(q, k, v, padding, slopes=2 * alibi_slopes(q.shape[1])),
    "the bias has the wrong sign": lambda q, k, v, padding: without_slopes(q, k, v, padding, bias=-signed_bias(q, k)),
    "not causal: queries see the keys after them": lambda q, k, v, padding: ours(q, k, v, padding, causal=False),
    "not causal, and the bias is missing": lambda q, k, v, padding: without_slopes(q, k, v, padding, causal=False),
    "queries are aligned with the first keys": first_keys,
    "padding is not hidden": lambda q, k, v, padding: ours(q, k, v, None),
    "the padding mask is read the wrong way round": lambda q, k, v, p: ours(q, k, v, None if p is None else ~p),
    "the bias is added before the scale": lambda q, k, v, p: ours(q, k, v, p, slopes=alibi_slopes(q.shape[1]) / 4),
    "the scale is 1 / D": lambda q, k, v, padding: ours(q, k, v, padding, scale=1 / 16),
    "the slopes of the key heads, each for a whole group": grouped_slopes,
}


@pytest.mark.parametrize("diagnosis", WRONG_ATTENTION)
def test_wrong_attention(diagnosis):
    report = check_attention(WRONG_ATTENTION[diagnosis], **FEW_HEADS)
    assert diagnoses(report) == {diagnosis}


def test_attention_that_sees_future_keys_with_a_signed_bias():
    def fn(q, k, v, padding):
        return without_slopes(q, k, v, padding, bias=signed_bias(q, k), causal=False)

    assert diagnoses(check_attention(fn, **FEW_HEADS)) == {"not causal: queries see the keys after them"}


def test_a_causal_encoder():
    report = check_attention(ours, dialect=DIALECTS["encoder"], **FEW_HEADS)
    assert diagnoses(report) == {"causal: queries do not see the keys after them"}


def test_attention_after_the_scale_in_a_dialect_before_it():
    falcon = dataclasses.replace(DIALECTS["falcon"], factors_dtype=None)
    assert diagnoses(check_attention(ours, dialect=falcon, **FEW_HEADS)) == {"the bias is added after the scale"}


@pytest.mark.parametrize(
    ("dialect", "factor", "options", "diagnosis"),
    [
        ("relative", 4, {}, "the bias is sqrt(D) too large, as if it were added before the scale"),
        ("bloom", 4, {}, "the bias is sqrt(D) too large, as if it were added before the scale"),
        ("mpt", 4, {}, "the bias is sqrt(D) too large, as if it were added before the scale"),
        ("encoder", 4, {"causal": False}, "the bias is sqrt(D) too large, as if it were added before the scale"),
        ("btlm", 16, {"scale": 1 / 16}, "the bias is D too large, as if it were added before the scale"),
        ("btlm", 1 / 16, {"scale": 1 / 16}, "the bias is added before the scale"),
        ("before", 1 / 16, {}, "the bias is divided by sqrt(D) twice"),
    ],
)
def test_a_bias_scaled_for_the_wrong_place(dialect, factor, options, diagnosis):
    def fn(q, k, v, padding):
        return ours(q, k, v, padding, slopes=factor * alibi_slopes(q.shape[1]), **options)

    meant = DIALECTS[dialect] if dialect in DIALECTS else Dialect(bias_before_scale=True)
    assert diagnoses(check_attention(fn, dialect=meant, **FEW_HEADS)) == {diagnosis}


@pytest.mark.parametrize("positions", ["first", "last"])
def test_a_bias_collapsed_by_rounding(positions):
    def fn(q, k, v, padding):
        origin = 0 if positions == "first" else k.shape[2] - 1
        bias = (alibi_slopes(q.shape[1])[:, None, None] * (torch.arange(k.shape[2]) - origin)).bfloat16()
        return without_slopes(q, k, v, padding, bias=bias.float())

    report = check_attention(fn, head_counts=[4], length=400)
    long = {"attention of 4 heads, 400 queries over 400 keys"}
    if positions == "first":  # from the last key, a decoding query has the bias of distances
        long.add("attention of 4 heads, decoding, 1 query over 400 keys")
    collapsed = [case for case in report.failures if case.error > 1e-3]  # the others have lost a few 1e-6 to float32
    assert {case.name for case in collapsed} == long
    assert {case.diagnosis for case in collapsed} == {
        f"the bias, made from absolute positions from the {positions} key, is rounded to bfloat16: "
        "neighbouring keys come to share one"
    }


def test_scores_rounded_with_the_bias_in_them():
    def fn(q, k, v, padding):
        if k.shape[1] != q.shape[1]:
            raise NotImplementedError
        scores = q.float() @ k.float().transpose(-2, -1) * q.shape[3] ** -0.5
        bias = absolute_bias(torch.bfloat16)(q.shape[1], q.shape[2], k.shape[2], padding)
        rounded = (scores + bias).bfloat16() - scores
        return by_hand(q.float(), k.float(), v.float(), padding, bias=rounded)

    report = check_attention(fn, dtype=torch.bfloat16, head_counts=[12], length=200)
    assert diagnoses(report) == {"scores are rounded once a bias of absolute positions, from the first key, is in them"}


def test_zero_bias_in_cached_decoding_alone():
    def fn(q, k, v, padding):
        return (ours if q.shape[2] == k.shape[2] else without_slopes)(q, k, v, padding)

    report = check_attention(fn, **FEW_HEADS)
    assert diagnoses(report) == {"the bias is missing"}
    assert all("decoding" in case.name or "chunk" in case.name for case in report.failures)


def test_wrong_head_dim_of_the_output():
    report = check_attention(lambda q, k, v, p: ours(q, k, v, p).transpose(1, 2), head_counts=[4], length=20)
    assert "gives shape (1, 33, 4, 16), not (1, 4, 33, 16)" in diagnoses(report)


# Reports.


def test_what_is_not_offered_is_listed_and_not_counted_as_failed():
    def fn(q, k, v, padding):
        if padding is not None:
            raise NotImplementedError
        return ours(q, k, v, padding)

    report = check_attention(fn, head_counts=[4], length=20)
    assert report.passed
    report.raise_if_failed()
    assert {case.outcome for case in report.cases if "padding" in case.name} == {"not offered"}
    assert "not offered: attention of 4 heads, 33 queries over 33 keys, left padding" in str(report).splitlines()


def test_a_report_of_nothing_has_not_passed():
    def fn(*arguments):
        raise NotImplementedError

    with pytest.raises(AssertionError, match=r"^0 of \d+ cases passed, 0 failed$"):
        check_attention(fn, head_counts=[4], length=20).raise_if_failed()


def test_report_as_text():
    report = Report(
        (
            Case("one", "passed", 1e-7, 2e-6),
            Case("two", "failed", 0.5, 2e-6, "the bias is missing"),
            Case("three", "not offered", math.inf, 2e-6),
        )
    )
    assert str(report).splitlines() == [
        "1 of 3 cases passed, 1 failed",
        "passed: one: error 1e-07, tolerance 2e-06",
        "failed: two: error 0.5, tolerance 2e-06: the bias is missing",
        "not offered: three",
    ]
    with pytest.raises(AssertionError) as raised:
        report.raise_if_failed()
    assert str(raised.value).splitlines() == [
        "1 of 3 cases passed, 1 failed",
        "failed: two: error 0.5, tolerance 2e-06: the bias is missing",
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"positions": "absolute"}, r"positions='absolute': give one of relative, first, last"),
        ({"positions": "first", "causal": False}, r"positions='first' with causal=False"),
        ({"bias_dtype": torch.int8}, r"bias_dtype=torch.int8: give"),
        ({"factors_dtype": "bfloat16"}, r"factors_dtype='bfloat16': give"),
    ],
)
def test_impossible_dialects(fields, message):
    with pytest.raises(ValueError, match=message):
        Dialect(**fields)


@pytest.mark.parametrize("num_heads", [0, -1, True, 2.0])
def test_impossible_head_counts(num_heads):
    with pytest.raises(ValueError, match="num_heads"):
        golden_slopes(num_heads)


@pytest.mark.parametrize("options", [{"head_counts": ()}, {"length": 0}, {"head_counts": [0]}])
@pytest.mark.parametrize("check", [check_bias, check_attention])
def test_impossible_questions(check, options):
    with pytest.raises(ValueError, match=r"head_counts is empty|length=0|head_counts=0"):
        check(lambda *arguments: None, **options)
