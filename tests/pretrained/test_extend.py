"""What an extended model computes, against the stock code where that is right and an oracle in float64 elsewhere."""

import copy
import math
import pickle
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from family_models import FAMILIES, HEADS, VOCABULARY, bloom, falcon, mpt, oracle, paper_slopes, tokens

import longreach
from longreach.conformance.golden import Reading
from longreach.positions.scaling import Scaling
from longreach.pretrained.attend import extension_of, fixed_length
from longreach.pretrained.families import OLDEST_TRANSFORMERS, find_layout
from longreach.pretrained.lengths import declared_length

pytestmark = pytest.mark.usefixtures("without_gradients")

CLOSE = {"rtol": 0, "atol": 2e-5}  # logits are of order 10, sums of some hundred float32 products


def interpolated(scaling, train_length, length, heads=HEADS):
    """Slopes by the definitions, in plain Python."""
    slopes, ratio = paper_slopes(heads), max(1.0, length / train_length)
    if scaling == "linear":
        return [slope / ratio for slope in slopes]
    if scaling == "ntk":
        order = sorted(slopes, reverse=True)
        return [slope * ratio ** (-order.index(slope) / (heads - 1)) for slope in slopes]
    return slopes


def test_equals_stock_at_its_length(model):
    ids = tokens(2, 32)
    stock = model(ids).logits
    longreach.extend(model, scaling="none")
    torch.testing.assert_close(model(ids).logits, stock, **CLOSE)


@pytest.mark.parametrize("scaling", ["none", "linear", "ntk"])
@pytest.mark.parametrize("length", [20, 75, 520])
def test_equals_the_oracle_at_any_length(model, scaling, length):
    """520 tokens are past the crossover to the CPU implementation that skips what is out of reach."""
    longreach.extend(model, scaling=scaling, train_length=32)
    ids = tokens(1, length)
    expected = oracle(model, ids[0], interpolated(scaling, 32, length))
    torch.testing.assert_close(model(ids).logits[0].double(), expected, **CLOSE)


def test_a_fixed_factor_and_a_stated_length_hold_at_any_length(model):
    ids = tokens(1, 40)
    longreach.extend(model, scaling="linear-fixed=2.5")
    expected = oracle(model, ids[0], [slope / 2.5 for slope in paper_slopes(HEADS)])
    torch.testing.assert_close(model(ids).logits[0].double(), expected, **CLOSE)
    longreach.extend(model, scaling="linear", train_length=32, length=80)
    torch.testing.assert_close(model(ids).logits[0].double(), expected, **CLOSE)


def test_logn_multiplies_the_logits_and_not_the_bias(model):
    longreach.extend(model, scaling="none+logn", train_length=32)
    ids = tokens(1, 70)
    expected = oracle(model, ids[0], paper_slopes(HEADS), logit_factor=math.log(70) / math.log(32))
    torch.testing.assert_close(model(ids).logits[0].double(), expected, **CLOSE)
    expected = oracle(model, ids[0, :20], paper_slopes(HEADS))
    torch.testing.assert_close(model(ids[:, :20]).logits[0].double(), expected, **CLOSE)


@pytest.mark.parametrize("options", [{"multi_query": True}, {"parallel_attn": True}, {"heads": 4}])
def test_falcon_in_its_variants(options):
    model = falcon(**options)
    slopes = paper_slopes(model.config.num_attention_heads)
    longreach.extend(model, scaling="none")
    ids = tokens(1, 50)
    torch.testing.assert_close(model(ids).logits[0].double(), oracle(model, ids[0], slopes), **CLOSE)


def test_falcon_with_grouped_queries_equals_its_sdpa():
    model = falcon(heads=4, new_decoder_architecture=True, parallel_attn=True, num_kv_heads=2)
    ids = tokens(2, 32)
    stock = model(ids).logits
    longreach.extend(model, scaling="none")
    torch.testing.assert_close(model(ids).logits, stock, **CLOSE)


def test_mpt_with_all_its_options():
    """A softmax_scale, clipped q, k and v, and a bias of its own maximum."""
    model = mpt(attn_config={"softmax_scale": 0.25, "clip_qkv": 0.8, "alibi_bias_max": 16})
    longreach.extend(model, scaling="none")
    ids = tokens(1, 50)
    slopes = [slope**2 for slope in paper_slopes(HEADS)]  # exponents twice as large
    torch.testing.assert_close(model(ids).logits[0].double(), oracle(model, ids[0], slopes), **CLOSE)


@pytest.mark.parametrize("scaling", ["none", "linear"])
def test_a_padded_row_fares_as_it_does_alone(model, scaling):
    longreach.extend(model, scaling=scaling, train_length=32)
    ids, mask = tokens(3, 60), torch.ones(3, 60, dtype=torch.long)
    mask[0, :25] = mask[1, :1] = 0
    logits = model(ids, attention_mask=mask).logits
    for row, padding in enumerate((25, 1, 0)):
        alone = model(ids[row : row + 1, padding:]).logits[0]
        torch.testing.assert_close(logits[row, padding:], alone, **CLOSE)
    mask = mask.flip(1)
    logits = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(logits[0, :35], model(ids[:1, :35]).logits[0], **CLOSE)


def test_a_stated_length_is_that_of_a_padded_row_too(model):
    ids, mask = tokens(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[0, :15] = 0
    expected = [
        oracle(model, row, interpolated("linear", 24, 96), logit_factor=math.log(96) / math.log(24))
        for row in (ids[0, 15:], ids[1])
    ]

    def check():
        logits = model(ids, attention_mask=mask).logits.double()
        torch.testing.assert_close(logits[0, 15:], expected[0], **CLOSE)
        torch.testing.assert_close(logits[1], expected[1], **CLOSE)

    longreach.extend(model, scaling="linear+logn", train_length=24, length=96)
    check()
    longreach.extend(model, scaling="linear+logn", train_length=24)
    with fixed_length(model, 96):
        check()


@pytest.mark.parametrize("by", ["position_ids", "cu_seq_lens_q"])
@pytest.mark.parametrize("scaling", ["none", "linear"])
def test_packed_documents_fare_as_they_do_alone(model, scaling, by):
    longreach.extend(model, scaling=scaling, train_length=32)
    lengths, ids = (7, 50, 1, 22), tokens(1, 80)
    if by == "position_ids":
        packing = {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}
    else:
        packing = {"cu_seq_lens_q": torch.tensor([0, 7, 57, 58, 80], dtype=torch.int32)}
    logits = model(ids, **packing).logits[0]
    alone = [model(piece[None]).logits[0] for piece in ids[0].split(lengths)]
    torch.testing.assert_close(logits, torch.cat(alone), **CLOSE)


def stock_reading(model, dtype):
    """How the stock code of a family computes ALiBi in a dtype."""
    layout = find_layout(model)
    return Reading(layout.dialect_in(dtype), slopes=lambda num_heads: layout.slopes)


def test_the_dialect_of_a_family_gives_what_its_stock_code_gives(model):
    ids, mask = tokens(2, 32), torch.ones(2, 32, dtype=torch.long)
    mask[0, :9] = 0
    stock = model(ids, attention_mask=mask).logits
    extension_of(longreach.extend(model, scaling="none")).reading = stock_reading(model, torch.float32)
    ours = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(ours[0, 9:], stock[0, 9:], rtol=0, atol=1e-5)
    torch.testing.assert_close(ours[1], stock[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["bloom", "falcon"])
def test_the_dialect_of_a_family_rounds_as_its_stock_code_does(family):
    """Past position 256 bfloat16 has no odd integers: neighbouring keys share a bias, bit for bit the stock one."""
    model = FAMILIES[family]()
    module = transformers.models.bloom.modeling_bloom if family == "bloom" else None
    module = module or transformers.models.falcon.modeling_falcon
    mask = torch.ones(1, 600, dtype=torch.long)
    stock = module.build_alibi_tensor(mask, HEADS, torch.bfloat16).view(1, HEADS, 1, 600)
    ours = stock_reading(model, torch.bfloat16).bias(HEADS, 1, 600, None)
    assert torch.equal(ours, stock.double())
    assert ours[0, 0, 0, 256:].unique().numel() < 344


def test_the_dialect_of_bloom_is_nearer_to_stock_in_bfloat16():
    model = bloom().bfloat16()
    ids = tokens(1, 700)
    stock = model(ids).logits.float()
    distance = []
    for reading in (None, stock_reading(model, torch.bfloat16)):
        extension_of(longreach.extend(model, scaling="none", train_length=2048)).reading = reading
        distance.append((model(ids).logits.float() - stock)[0, 300:].square().mean())
    assert distance[1] < 0.5 * distance[0]


def test_gelu_of_bloom_is_rounded_once():
    model, x = bloom().bfloat16(), torch.linspace(-3, 9, 2001, dtype=torch.bfloat16)
    gelu = model.transformer.h[0].mlp.gelu_impl
    stock = gelu(x)
    rounded_once = F.gelu(x.double(), approximate="tanh").bfloat16()
    longreach.extend(model, scaling="none", train_length=2048)
    # In between it is float32, whose last bit may tip the rounding over.
    assert (gelu(x) != rounded_once).float().mean() < 0.01 < (stock != rounded_once).float().mean()


def test_exact_bias_in_bfloat16_is_nearer_to_the_truth_than_stock():
    model = bloom().bfloat16()
    ids = tokens(1, 700)
    expected = oracle(model, ids[0], paper_slopes(HEADS))
    stock = (model(ids).logits[0].double() - expected)[300:].square().mean()
    longreach.extend(model, scaling="none", train_length=2048)
    ours = (model(ids).logits[0].double() - expected)[300:].square().mean()
    assert ours < 0.5 * stock


def test_restore_is_bit_identical_and_leaves_nothing(model):
    ids = tokens(2, 30)
    classes = [type(module) for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    stock, state = model(ids).logits, {name: w.clone() for name, w in model.state_dict().items()}
    assert longreach.extend(model, scaling="ntk", train_length=8) is model
    assert model.state_dict().keys() == state.keys()
    assert not torch.equal(model(ids).logits, stock)
    assert longreach.restore(model) is model
    assert torch.equal(model(ids).logits, stock)
    assert [type(module) for module in model.modules()] == classes
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert all(torch.equal(w, state[name]) for name, w in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_pickled_it_is_extended_still_and_can_be_restored(model):
    ids = tokens(2, 30)
    stock = model(ids).logits
    longreach.extend(model, scaling="ntk", train_length=8)
    again = pickle.loads(pickle.dumps(model))
    assert [type(module) for module in again.modules()] == [type(module) for module in model.modules()]
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert torch.equal(longreach.restore(again)(ids).logits, stock)
    assert not torch.equal(model(ids).logits, stock)


def test_extending_anew_replaces_what_was(model):
    ids = tokens(1, 60)
    stock = model(ids[:, :32]).logits
    longreach.extend(model, scaling="linear", train_length=32)
    longreach.extend(model, scaling="ntk", train_length=32)
    torch.testing.assert_close(
        model(ids).logits[0].double(), oracle(model, ids[0], interpolated("ntk", 32, 60)), **CLOSE
    )
    longreach.restore(model)
    assert torch.equal(model(ids[:, :32]).logits, stock)


def test_a_part_of_the_model_will_do(model):
    ids = tokens(1, 20)
    stock = model(ids).logits
    longreach.extend(model, scaling="linear", train_length=8)
    longreach.extend(model.transformer, scaling="ntk", train_length=8)
    with pytest.raises(ValueError, match="not stated"):
        model.generate(ids, max_new_tokens=4, use_cache=True)  # the head is not extended any more
    longreach.restore(model)
    longreach.extend(model, scaling="ntk", train_length=8)
    longreach.restore(model.transformer)
    assert torch.equal(model(ids).logits, stock)
    assert extended_modules(model) == []


def test_restore_leaves_alone_what_others_have_wrapped_since():
    """FSDP2 for one makes a module an instance of a subclass of its class."""
    model = bloom()
    longreach.extend(model, scaling="none", train_length=32)
    ours = type(model.transformer)
    model.transformer.__class__ = type("Sharded", (ours,), {})
    with pytest.raises(ValueError, match="Sharded was given another class since extend"):
        longreach.restore(model)
    model.transformer.__class__ = ours
    longreach.restore(model)
    assert extended_modules(model) == []


def extended_modules(model):
    return [module for module in model.modules() if "_longreach" in vars(module)]


def test_another_model_of_the_same_configuration_is_left_alone():
    model = bloom()
    other = transformers.BloomForCausalLM(model.config).eval()
    ids = tokens(1, 20)
    stock = other(ids).logits
    longreach.extend(model, scaling="linear", train_length=8)
    assert torch.equal(other(ids).logits, stock)


def test_a_copy_of_an_extended_model_lives_by_itself(model):
    ids = tokens(1, 60)
    longreach.extend(model, scaling="linear", train_length=32)
    twin = copy.deepcopy(model)
    extended = model(ids).logits
    longreach.restore(model)
    torch.testing.assert_close(twin(ids).logits, extended, rtol=0, atol=0)
    torch.nn.init.zeros_(twin.get_input_embeddings().weight)
    assert model.get_input_embeddings().weight.any()
    longreach.restore(twin)
    assert type(twin) is type(model)


def test_a_base_model_without_a_head():
    model = bloom().transformer
    ids = tokens(1, 40)
    stock = model(ids).last_hidden_state
    longreach.extend(model, scaling="none", train_length=32)
    torch.testing.assert_close(model(ids, None, None).last_hidden_state, stock, **CLOSE)  # arguments by position
    assert torch.equal(longreach.restore(model)(ids).last_hidden_state, stock)


def test_input_embeddings_in_place_of_tokens(model):
    longreach.extend(model, scaling="linear", train_length=8)
    ids = tokens(1, 40)
    embedded = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embedded).logits, model(ids).logits, **CLOSE)


def test_saved_under_its_own_name(model, tmp_path):
    ids = tokens(1, 20)
    stock = model(ids).logits
    longreach.extend(model, scaling="none", train_length=32)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager" if model.config.model_type != "falcon" else "sdpa"
    )
    assert torch.equal(loaded.eval()(ids).logits, stock)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"scaling": "yarn"}, 'scaling="yarn" scales the frequencies of rotary positions'),
        ({"scaling": "linear-fixed"}, "scaling='linear-fixed'"),
        ({"scaling": "linear-fixed=1"}, "factor=1.0"),
        ({"scaling": "linear=2"}, "scaling='linear=2'"),
        ({"train_length": 0}, "train_length=0"),
        ({"scaling": Scaling("linear", 32), "train_length": 64}, "train_length=64 beside"),
        ({"length": 0}, "length=0"),
        ({"length": 64.0}, "length=64.0"),
        ({"per_step": True, "length": 64}, "per_step=True with length=64"),
        ({"per_step": True, "scaling": "none"}, 'per_step=True with scaling="none"'),
        ({"sinks": 4}, "sinks=4 and window=None"),
        ({"window": 4}, "sinks=None and window=4"),
        ({"sinks": -1, "window": 4}, "sinks=-1"),
        ({"sinks": 4, "window": 0}, "window=0"),
        ({"tolerance": 1.0}, "tolerance=1.0"),
        ({"impl": "fast"}, "impl='fast'"),
    ],
)
def test_what_is_refused_leaves_the_model_untouched(arguments, told):
    model = mpt()
    before = [(type(module), dict(vars(module))) for module in model.modules()]
    with pytest.raises(ValueError, match=told):
        longreach.extend(model, **arguments)
    assert [(type(module), dict(vars(module))) for module in model.modules()] == before


def test_a_refusal_leaves_an_earlier_extension_in_place():
    model = mpt()
    longreach.extend(model, scaling="linear", train_length=16)
    extension = extension_of(model)
    with pytest.raises(ValueError, match="factor=0"):
        longreach.extend(model, scaling="linear-fixed=0")
    assert extension_of(model) is extension


def test_train_length_comes_from_the_configuration_or_must_be_given():
    for model, length in (
        (mpt(max_seq_len=77), 77),
        (falcon(), 32),
        (bloom(seq_length=99), 99),
        (mpt(max_seq_len=77, train_length=16), 16),
        (bloom(seq_length=99, alibi_scaling={"type": "linear", "train_seq_len": 24}), 24),
    ):
        assert extension_of(longreach.extend(model, scaling="linear")).scaling == Scaling("linear", length)
        assert declared_length(model.config) == length  # which evaluate and doctor take
    with pytest.raises(ValueError, match="train_length=None"):
        longreach.extend(bloom(), scaling="linear")
    with pytest.raises(ValueError, match=r'train_length=None with scaling="none\+logn"'):
        longreach.extend(bloom(), scaling="none+logn")


def test_without_a_scaling_it_is_the_configuration_s():
    ids = tokens(1, 60)
    assert extension_of(longreach.extend(bloom())).scaling == Scaling("none")
    for told, divisor in (({"type": "linear", "factor": 2.5}, 2.5), ({"type": "linear", "train_seq_len": 24}, 2.5)):
        model = bloom(alibi_scaling=told)
        longreach.extend(model)
        expected = oracle(model, ids[0], [slope / divisor for slope in paper_slopes(HEADS)])
        torch.testing.assert_close(model(ids).logits[0].double(), expected, **CLOSE)
        longreach.extend(model, scaling="none")
        torch.testing.assert_close(model(ids).logits[0].double(), oracle(model, ids[0], paper_slopes(HEADS)), **CLOSE)
    assert extension_of(longreach.extend(model, train_length=30)).scaling == Scaling("linear", 30)
    model.config.train_length = 16  # of a fine-tuning, while its slopes fall from 24 on
    assert extension_of(longreach.extend(model)).scaling == Scaling("linear", 24)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"attn_config": {"qk_ln": True}}, r"attn_config\.qk_ln=True"),
        ({"attn_config": {"prefix_lm": True}}, r"attn_config\.prefix_lm=True"),
        ({"attn_config": {"rope": True}}, r"attn_config\.rope=True"),
        ({"attn_config": {"sliding_window_size": 16}}, r"attn_config\.sliding_window_size=16"),
        ({"attn_config": {"attn_logit_softcapping": 30.0}}, r"attn_config\.attn_logit_softcapping=30\.0"),
        ({"ffn_config": {"ffn_type": "mptglu"}}, r"ffn_config\.ffn_type='mptglu'"),
        ({"norm_type": "low_precision_rmsnorm"}, r"norm_type='low_precision_rmsnorm'"),
        ({"no_bias": False}, r"no_bias=False"),
        ({"logit_scale": 0.5}, r"logit_scale=0\.5"),
        ({"logit_scale": "inv_sqrt_d_model"}, r"logit_scale='inv_sqrt_d_model'"),
    ],
)
def test_an_mpt_that_transformers_does_not_compute_is_refused(options, told):
    model, ids = mpt(**options), tokens(1, 20)
    before = model(ids).logits
    with pytest.raises(ValueError, match=f"^{told}: transformers' own code does not compute it"):
        longreach.extend(model, scaling="none")
    assert type(model) is transformers.MptForCausalLM
    assert torch.equal(model(ids).logits, before)


def test_models_without_alibi_or_of_unknown_family():
    with pytest.raises(ValueError, match="alibi=False: this Falcon has rotary"):
        longreach.extend(falcon(alibi=False))
    with pytest.raises(ValueError, match=r"attn_config.alibi=False"):
        longreach.extend(mpt(attn_config={"alibi": False}))
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert = transformers.BertModel(transformers.BertConfig(vocab_size=VOCABULARY, **sizes))
    told = "baichuan; and after longreach.convert and fine-tuning one of gpt2, llama, mistral, qwen2$"
    with pytest.raises(ValueError, match=f"model_type bert: longreach can extend one of bloom, mpt, .*{told}"):
        longreach.extend(bert)
    with pytest.raises(ValueError, match="model_type none"):
        longreach.extend(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="holds 2 base models"):
        longreach.extend(torch.nn.ModuleList([bloom(), bloom()]), train_length=32)
    with pytest.raises(ValueError, match="Linear is not extended"):
        longreach.restore(torch.nn.Linear(2, 2))


def test_transformers_of_another_time_is_refused(monkeypatch):
    model = mpt()
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.3.9")  # which replaces itself on its import
    with pytest.raises(ValueError, match=r"transformers 5.3.9: .* needs 5.4 or later"):
        longreach.extend(model)


def test_the_oldest_transformers_is_stated_and_tested():
    root = Path(__file__).parents[2]
    oldest = ".".join(str(part) for part in OLDEST_TRANSFORMERS)
    places = {
        "pyproject.toml": f'"transformers>={oldest}"',
        "requirements-oldest.txt": f"transformers=={oldest}.",
        "docs/extension.md": f"transformers {oldest} ",
    }
    assert [file for file, words in places.items() if words not in (root / file).read_text(encoding="utf-8")] == []


def test_remote_code_under_the_name_of_a_family_is_refused():
    model = torch.nn.Module()
    model.config = transformers.MptConfig()
    with pytest.raises(ValueError, match="holds 0 base models of family mpt"):
        longreach.extend(model)


def test_documents_packed_differently_in_each_row_are_refused(model):
    longreach.extend(model, scaling="none", train_length=32)
    with pytest.raises(ValueError, match="pack the rows of the batch differently"):
        model(tokens(2, 10), position_ids=torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4], [*range(10)]]))


def test_an_implementation_by_name(model):
    ids = tokens(1, 40)
    logits = {}
    for impl in ("reference", "sdpa", "cpu"):
        longreach.extend(model, scaling="none", train_length=32, impl=impl, tolerance=1e-9)
        logits[impl] = model(ids).logits
    torch.testing.assert_close(logits["cpu"], logits["reference"], **CLOSE)
    torch.testing.assert_close(logits["sdpa"], logits["reference"], **CLOSE)
