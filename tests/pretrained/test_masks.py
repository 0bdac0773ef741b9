"""Masks of every kind on extended models, against the stock code, and against an oracle where that is wrong."""

import copy

import pytest
import torch
import transformers
from family_models import FAMILIES, HEADS, VOCABULARY, bloom, falcon, mpt, oracle, paper_slopes, tokens
from torch._dynamo.testing import CompileCounter
from transformers import DynamicCache, StaticCache

import longreach
from longreach.pretrained.attend import fixed_length

pytestmark = [
    pytest.mark.usefixtures("without_gradients"),
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"),
]

CLOSE = {"rtol": 0, "atol": 2e-5}

HOLES = torch.tensor([[0] * 3 + [1] * 6 + [0] * 4 + [1] * 7, [1] * 15 + [0] * 2 + [1] * 3, [1] * 12 + [0] * 8])


@pytest.fixture
def pair(model):
    """A stock model, and its copy extended."""
    return model, longreach.extend(copy.deepcopy(model), scaling="none")


def assert_tokens_alike(ours, stock, mask):
    torch.testing.assert_close(ours[mask.bool()], stock[mask.bool()], **CLOSE)


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32, torch.int32])
def test_padding_between_tokens_is_as_the_stock_code_has_it(pair, dtype):
    """BLOOM and Falcon count positions without it, MPT with it."""
    stock, ours = pair
    ids, mask = tokens(3, 20), HOLES.to(dtype)
    assert_tokens_alike(ours(ids, attention_mask=mask).logits, stock(ids, attention_mask=mask).logits, mask)


def test_distances_over_padding_between_tokens_are_exact(model):
    ids, mask = tokens(1, 20), HOLES[:1].bool()
    index = mask[0].cumsum(0) - 1 if model.config.model_type != "mpt" else torch.arange(20)
    distance = (index[:, None] - index).double().masked_fill(~mask | (torch.ones(20, 20).triu(1) > 0), float("inf"))
    seen = mask[0].nonzero()[:, 0]
    expected = oracle(model.double(), ids[0, seen], paper_slopes(HEADS), distance=distance[seen][:, seen])
    longreach.extend(model, scaling="none")
    # Falcon's slopes of 6 heads are no float32 numbers times 8**-0.5, which costs it 1e-7 of a score.
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[0, seen], expected, rtol=0, atol=1e-5)


def test_decoding_over_padding_between_tokens(pair):
    stock, ours = pair
    ids, mask = tokens(3, 20), HOLES
    pieces = []
    for model in (ours, stock):
        cache, done = DynamicCache(), 0
        for piece in ids.split([11, 1, 1, 7], dim=1):
            done += piece.shape[1]
            out = model(piece, attention_mask=mask[:, :done], past_key_values=cache, use_cache=True)
            pieces.append(out.logits)
    assert_tokens_alike(torch.cat(pieces[:4], dim=1), torch.cat(pieces[4:], dim=1), mask)


@pytest.mark.parametrize("scaling", ["linear", "ntk"])
def test_a_row_s_length_leaves_out_padding_between_tokens_at_every_step(model, scaling):
    longreach.extend(model, scaling=scaling, train_length=8)
    ids, mask = tokens(3, 20), HOLES
    cached = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    plain = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("padding", ["right", "told by the pad token", "left"])
def test_generate_pads_as_the_stock_code_does(pair, padding, cache):
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    if padding == "told by the pad token":
        ids[0, 4] = ids[1, 7:9] = 0
        mask = (ids != 0).long()
    else:
        mask[0, slice(8, 12) if padding == "right" else slice(0, 4)] = 0
    given = {} if padding == "told by the pad token" else {"attention_mask": mask}
    options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    stock = pair[0].generate(ids, **given, **options)  # whose static cache fails on Falcon
    ours = pair[1].generate(ids, **given, **options, cache_implementation=cache)
    assert torch.equal(ours.sequences, stock.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(stock.logits), **CLOSE)


def static_cache(model):
    return StaticCache(config=model.config, max_cache_len=32)


@pytest.mark.parametrize("shape", [(2, 25), (2, 10), (3, 20), (1, 20), (2, 19)])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("cache", [lambda model: None, lambda model: DynamicCache(), static_cache])
def test_a_mask_of_another_batch_or_length_is_refused(model, shape, zeros, cache):
    longreach.extend(model, scaling="none")
    mask = torch.ones(shape, dtype=torch.long)
    mask[:, 0] = 0 if zeros else 1
    told = rf"attention_mask of shape \({shape[0]}, {shape[1]}\): give \(B, T\) = \(2, 20\)"
    with pytest.raises(ValueError, match=told):
        model(tokens(2, 20), attention_mask=mask, past_key_values=cache(model))


@pytest.mark.parametrize("cache", [lambda model: DynamicCache(), static_cache])
def test_what_a_cache_holds_is_counted_in_the_length_of_a_mask(model, cache):
    longreach.extend(model, scaling="none")
    held = cache(model)
    model(tokens(2, 20), past_key_values=held, use_cache=True)
    with pytest.raises(ValueError, match=r"give \(B, T\) = \(2, 21\), with what the cache holds"):
        model(tokens(2, 1), attention_mask=torch.ones(2, 20, dtype=torch.long), past_key_values=held)


@pytest.mark.parametrize("kind", ["float", "bool"])
def test_masks_of_four_axes_on_mpt_are_as_in_its_stock_code(kind):
    """Which hides what is not 0, also of a bool mask."""
    stock, ids = mpt(), tokens(2, 12)
    ours = longreach.extend(copy.deepcopy(stock), scaling="none")
    hidden = torch.rand(2, 1, 12, 12, generator=torch.Generator().manual_seed(0)) < 0.4
    hidden |= torch.ones(12, 12, dtype=torch.bool).triu(3)  # some see what comes after them
    hidden &= ~torch.eye(12, dtype=torch.bool)
    mask = hidden if kind == "bool" else hidden * torch.finfo(torch.float32).min
    torch.testing.assert_close(ours(ids, attention_mask=mask).logits, stock(ids, attention_mask=mask).logits, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_a_mask_of_four_axes_is_none_of_ours_whatever_its_dtype(dtype):
    ids, seen = tokens(1, 6), torch.ones(1, 1, 6, 6).tril()
    seen[..., 2:, 1] = 0
    ours = longreach.extend(mpt(), scaling="none")
    expected = ours(ids, attention_mask=seen == 0).logits
    assert torch.equal(ours(ids, attention_mask=(1 - seen).to(dtype)).logits, expected)
    with pytest.raises(ValueError, match=r"attention_mask of shape \(1, 1, 6, 6\): give \(B, T\)"):
        longreach.extend(bloom(), scaling="none")(ids, attention_mask=seen.to(dtype))
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=VOCABULARY, **sizes)).eval()
    converted = longreach.convert(llama)
    with pytest.raises(ValueError, match=rf"attention_mask of \(1, 1, 6, 6\) in {dtype}: give bool"):
        converted(ids, attention_mask=seen.to(dtype))
    weights = converted(ids, attention_mask=seen.bool(), output_attentions=True).attentions
    assert all(torch.equal(x[0] > 0, (seen[0] > 0).expand(HEADS, 6, 6)) for x in weights)


@pytest.mark.parametrize("filled", [0, 19])
def test_a_mask_of_four_axes_for_a_single_query_is_no_padding(filled):
    """Which would take hidden keys from L'."""
    found = []
    for heads in (1, HEADS):
        model = longreach.extend(mpt(), scaling="linear", train_length=8, per_step=True)
        ids, cache = tokens(1, 20)[:, : filled + 1], DynamicCache()
        if filled:
            model(ids[:, :filled], past_key_values=cache, use_cache=True)
        hidden = torch.zeros(1, heads, 1, filled + 1)
        hidden[..., 3:12] = 1
        found.append(model(ids[:, filled:], attention_mask=hidden, past_key_values=cache, use_cache=True).logits)
    assert torch.equal(*found)


def test_a_single_token_may_be_padding(model):
    """Whose row is as if it was not there."""
    longreach.extend(model, scaling="none")
    ids, mask = tokens(2, 1), torch.tensor([[0], [1]])
    assert torch.equal(model(ids, attention_mask=mask).logits[1], model(ids).logits[1])


@pytest.mark.parametrize("make", [bloom, falcon])
def test_masks_of_four_axes_are_refused_where_the_stock_code_takes_none(make):
    stock, mask = make(), torch.zeros(2, 1, 10, 10)
    with pytest.raises(ValueError, match="too many values"):
        stock(tokens(2, 10), attention_mask=mask)
    longreach.extend(stock, scaling="none")
    with pytest.raises(ValueError, match=r"attention_mask of shape \(2, 1, 10, 10\): give \(B, T\) with 0 for padding"):
        stock(tokens(2, 10), attention_mask=mask)


@pytest.mark.parametrize("form", ["2-D", "none", "static"])
def test_attention_weights_are_those_of_the_stock_code(form):
    """Not so for Falcon, whose stock code adds its bias twice where weights are wanted."""
    for make in (bloom, mpt):
        stock, ids = make(), tokens(3, 20)
        ours = longreach.extend(copy.deepcopy(stock), scaling="none")
        found = []
        for model in (stock, ours):
            given = {"attention_mask": HOLES if form == "2-D" else None}
            if form == "static":
                given = {"attention_mask": torch.ones(3, 32), "past_key_values": static_cache(model)}
            found.append(model(ids, output_attentions=True, **given))
        assert len(found[1].attentions) == 2
        mask = HOLES.bool() if form == "2-D" else torch.ones(3, 20, dtype=torch.bool)
        for theirs, weights in zip(found[0].attentions, found[1].attentions, strict=True):
            assert weights.shape == theirs.shape
            torch.testing.assert_close(weights.transpose(1, 2)[mask], theirs.transpose(1, 2)[mask], **CLOSE)
        assert_tokens_alike(found[1].logits, found[0].logits, mask)


def test_attention_weights_in_float16_are_of_scores_that_it_holds(model):
    """Their products before the scale are beyond 65,504."""
    for name, parameter in model.named_parameters():
        if name.endswith(("query_key_value.weight", "Wqkv.weight")):
            parameter.mul_(60)
    longreach.extend(model.half(), scaling="none")
    out = model(tokens(1, 12), output_attentions=True)
    assert all(weights.isfinite().all() for weights in out.attentions)
    assert out.logits.isfinite().all()


@pytest.mark.parametrize("scaling", ["none", "linear+logn"])
@pytest.mark.parametrize("packed", [False, True])
def test_attention_weights_give_the_outputs(model, scaling, packed):
    longreach.extend(model, scaling=scaling, train_length=8)
    ids = tokens(1, 20)
    given = {"position_ids": torch.cat([torch.arange(12), torch.arange(8)])[None]} if packed else {}
    if packed and model.config.model_type != "falcon":
        given = {"cu_seq_lens_q": torch.tensor([0, 12, 20])}
    out = model(ids, output_attentions=True, use_cache=False, **given)
    torch.testing.assert_close(out.logits, model(ids, use_cache=False, **given).logits, **CLOSE)
    for weights in out.attentions:
        assert weights.shape == (1, HEADS, 20, 20)
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(1, HEADS, 20))
        assert not weights.triu(1).any()
        assert bool(weights[..., 12:, :12].any()) is not packed


@pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")
def test_attention_weights_through_checkpointed_layers(model):
    longreach.extend(model, scaling="none")
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with torch.enable_grad():
        out = model(tokens(1, 9), output_attentions=True, use_cache=False)
        out.logits.sum().backward()
    assert [weights.shape for weights in out.attentions] == [(1, HEADS, 9, 9)] * 2


def test_sinks_give_no_weights(model):
    longreach.extend(model, sinks=2, window=8)
    with pytest.raises(ValueError, match=r"output_attentions=True: a cache of sinks .* gives no weights"):
        model.generate(tokens(1, 12), max_new_tokens=2, output_attentions=True, return_dict_in_generate=True)


def compiled(model, **options):
    torch.compiler.reset()
    counter = CompileCounter()
    return torch.compile(model, backend=counter, fullgraph=True, **options), counter


@pytest.mark.parametrize("scaling", ["none", "linear"])
def test_a_mask_under_compile_breaks_no_graph(model, scaling):
    longreach.extend(model, scaling=scaling, train_length=8)
    run, counter = compiled(model)
    for mask in (HOLES, HOLES.flip(1), torch.ones_like(HOLES)):
        got = run(tokens(3, 20), attention_mask=mask, use_cache=False).logits
        assert_tokens_alike(got, model(tokens(3, 20), attention_mask=mask, use_cache=False).logits, mask)
    assert counter.frame_count == 1
    torch.compiler.reset()


@pytest.mark.parametrize("scaling", ["none", "linear"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_static_cache_under_compile_is_one_graph(model, scaling, masked):
    longreach.extend(model, scaling=scaling, train_length=8)
    ids, mask = tokens(3, 20), HOLES if masked else None
    with fixed_length(model, 20):
        expected = model(ids, attention_mask=mask).logits[:, 14:]
        cache, pieces = static_cache(model), []
        padded = None if mask is None else torch.nn.functional.pad(mask, (0, 12), value=1)
        model(ids[:, :14], attention_mask=padded, past_key_values=cache, use_cache=True)
        run, counter = compiled(model)
        for token in ids[:, 14:].split(1, dim=1):
            pieces.append(run(token, attention_mask=padded, past_key_values=cache, use_cache=True).logits)
    seen = torch.ones(3, 6) if mask is None else mask[:, 14:]
    assert_tokens_alike(torch.cat(pieces, dim=1), expected, seen)
    assert counter.frame_count == 1
    torch.compiler.reset()


def test_models_and_masks_without_values(model):
    longreach.extend(model, scaling="linear", train_length=8)
    ids, mask = tokens(3, 20).to("meta"), HOLES.to("meta")
    extended = copy.deepcopy(model)
    expected = model(tokens(3, 20)).logits
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        extended(torch.ones(3, 20).long())
    assert torch.equal(extended(tokens(3, 20)).logits, expected)  # what was kept is no fake
    assert model.to("meta")(ids, attention_mask=mask).logits.shape[:2] == (3, 20)
    longreach.restore(model)
    with torch._subclasses.FakeTensorMode():
        fake = longreach.extend(type(model)(model.config), scaling="linear", train_length=8)
        assert fake(torch.ones(3, 20).long(), attention_mask=torch.ones(3, 20)).logits.shape[:2] == (3, 20)


def test_extended_on_meta_it_computes_once_weights_are_there(model):
    ids = tokens(1, 20)
    with torch.device("meta"):
        other = longreach.extend(type(model)._from_config(model.config), scaling="linear", train_length=8)
    other.to_empty(device="cpu").load_state_dict(model.state_dict())
    longreach.extend(model, scaling="linear", train_length=8)
    assert torch.equal(other.eval()(ids).logits, model(ids).logits)


class Exported(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask=None):
        return self.model(input_ids, attention_mask=attention_mask, use_cache=False).logits


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_exported_with_a_length_from_two_on(family):
    model, mask = longreach.extend(FAMILIES[family](), scaling="none"), HOLES[:2, :9].clone()
    length = torch.export.Dim("length", min=2)
    program = torch.export.export(Exported(model), (tokens(2, 9), mask), dynamic_shapes=({1: length}, {1: length}))
    for tokens_given in (2, 20, 600):
        ids, mask = tokens(2, tokens_given), torch.ones(2, tokens_given, dtype=torch.long)
        mask[0, : tokens_given // 3] = 0
        got = program.module()(ids, mask)
        assert_tokens_alike(got, model(ids, attention_mask=mask).logits, mask)


HEADS_OF_MODELS = ["ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"]


@pytest.mark.parametrize("kind", HEADS_OF_MODELS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_other_heads_see_padded_rows_as_stock(model, kind, side):
    name = type(model).__name__.replace("ForCausalLM", kind)
    config = copy.deepcopy(model.config)
    config.pad_token_id = 0
    stock = getattr(transformers, name)(config).eval()
    ids, mask = tokens(2, 15), torch.ones(2, 15, dtype=torch.long)
    mask[0, slice(0, 6) if side == "left" else slice(9, 15)] = 0
    ids = ids * mask
    ours = longreach.extend(copy.deepcopy(stock), scaling="none")
    with_mask, expected = ours(ids, attention_mask=mask), stock(ids, attention_mask=mask)
    for got, wanted in zip(with_mask.to_tuple(), expected.to_tuple(), strict=True):
        if isinstance(got, torch.Tensor):
            seen = mask.bool() if got.shape[:2] == (2, 15) else slice(None)
            torch.testing.assert_close(got[seen], wanted[seen], **CLOSE)
