import math

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers

from longreach.pretrained.convert import convert, unconvert
from longreach.pretrained.extend import extend
from longreach.pretrained.restore import restore

HEADS, WIDTH, VOCABULARY, TRAINED = 6, 48, 50, 32


def gpt2(**options):
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=HEADS, n_positions=TRAINED, **options
    )
    return ready(transformers.GPT2LMHeadModel(config))


def llama_like(model_class, config_class, **options):
    config = config_class(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        max_position_embeddings=TRAINED,
        **{"num_key_value_heads": 2, **options},
    )
    return ready(model_class(config))


def ready(model):
    """Weights large enough for attention to have preferences, and no special tokens."""
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25, generator=generator)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


MODELS = {
    "gpt2": gpt2,
    "llama": lambda: llama_like(transformers.LlamaForCausalLM, transformers.LlamaConfig),
    "mistral": lambda: llama_like(transformers.MistralForCausalLM, transformers.MistralConfig, sliding_window=None),
    "qwen2": lambda: llama_like(transformers.Qwen2ForCausalLM, transformers.Qwen2Config),
}


@pytest.fixture(params=MODELS)
def model(request):
    """A tiny model of each kind in turn, as loaded."""
    return MODELS[request.param]()


def tokens_of(*shape):
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(3))


# What a converted model computes, written down anew in float64 from its weights.


def alibi_attention(q, k, v):
    """Of (T, H, D) and (T, Hkv, D), the slopes of 6 heads written out."""
    slopes = torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3], dtype=torch.float64)
    k, v = (x.repeat_interleave(HEADS // x.shape[1], dim=1) for x in (k, v))
    positions = torch.arange(q.shape[0])
    distance = positions[:, None] - positions
    scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(q.shape[-1]) - slopes[:, None, None] * distance
    weights = scores.masked_fill(distance < 0, -math.inf).softmax(-1)
    return torch.einsum("hij,jhd->ihd", weights, v).flatten(1)


def gpt2_logits(state, tokens):
    """Of (T,) token ids."""
    x = state["transformer.wte.weight"][tokens]

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)

    def linear(x, name):
        return x @ state[f"{name}.weight"] + state[f"{name}.bias"]

    for layer in range(2):
        block = f"transformer.h.{layer}"
        q, k, v = linear(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn").split(WIDTH, dim=-1)
        heads = (y.unflatten(-1, (HEADS, -1)) for y in (q, k, v))
        x = x + linear(alibi_attention(*heads), f"{block}.attn.c_proj")
        up = linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")
        x = x + linear(F.gelu(up, approximate="tanh"), f"{block}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ state["transformer.wte.weight"].T


def llama_logits(state, tokens):
    """Of (T,) token ids; Qwen2's projections have biases, the others' have none."""
    x = state["model.embed_tokens.weight"][tokens]

    def norm(x, name):
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * state[f"{name}.weight"]

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0.0)

    for layer in range(2):
        block = f"model.layers.{layer}"
        y = norm(x, f"{block}.input_layernorm")
        heads = (linear(y, f"{block}.self_attn.{name}_proj").unflatten(-1, (-1, WIDTH // HEADS)) for name in "qkv")
        x = x + linear(alibi_attention(*heads), f"{block}.self_attn.o_proj")
        y = norm(x, f"{block}.post_attention_layernorm")
        gated = F.silu(linear(y, f"{block}.mlp.gate_proj")) * linear(y, f"{block}.mlp.up_proj")
        x = x + linear(gated, f"{block}.mlp.down_proj")
    return linear(norm(x, "model.norm"), "lm_head")


def golden(model, tokens):
    """Logits (B, T, V) float64."""
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    logits = gpt2_logits if model.config.model_type == "gpt2" else llama_logits
    return torch.stack([logits(state, row) for row in tokens])


@pytest.mark.parametrize("length", [1, 7, TRAINED, 3 * TRAINED, 520])
def test_logits_are_those_of_the_definition(model, length):
    tokens = tokens_of(2, length)
    convert(model)
    expected = golden(model, tokens)
    assert (model(tokens).logits - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("options", [{"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False}])
def test_gpt2s_other_scales_are_kept(options):
    model, tokens = gpt2(**options), tokens_of(1, 12)
    layers = model.transformer.h
    with torch.no_grad():  # the same as plain weights on the queries
        plain = gpt2()
        for number, (block, stock) in enumerate(zip(layers, plain.transformer.h, strict=True)):
            factor = 1 / (number + 1) if "scale_attn_by_inverse_layer_idx" in options else math.sqrt(WIDTH // HEADS)
            stock.attn.c_attn.weight[:, :WIDTH] = block.attn.c_attn.weight[:, :WIDTH] * factor
            stock.attn.c_attn.bias[:WIDTH] = block.attn.c_attn.bias[:WIDTH] * factor
    expected = golden(plain, tokens)
    assert (convert(model)(tokens).logits - expected).abs().max() < 1e-5 * expected.abs().max()


def test_conversion_changes_outputs_but_no_weight(model):
    tokens = tokens_of(2, 20)
    before = model(tokens).logits
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert convert(model) is model
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert (model(tokens).logits - before).abs().max() > 0.1
    unconvert(model)
    assert torch.equal(model(tokens).logits, before)
    assert not hasattr(model.config, "longreach_positions")


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_cached_generation_is_the_full_forward(model, cache):
    convert(model)
    prompt = tokens_of(1, TRAINED - 4)
    out = model.generate(prompt, max_new_tokens=20, do_sample=False, cache_implementation=cache)
    expected = prompt
    for _ in range(20):
        expected = torch.cat((expected, model(expected, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    assert out.tolist() == expected.tolist()
    assert out.shape[1] > TRAINED


def test_decoding_in_chunks_is_the_full_forward(model):
    convert(model)
    tokens = tokens_of(2, 50)
    cache, pieces = transformers.DynamicCache(config=model.config), []
    for chunk in tokens.split([20, 1, 1, 17, 11], dim=1):
        pieces.append(model(chunk, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens).logits, atol=1e-5, rtol=1e-5)


def test_left_padding_changes_nothing(model):
    convert(model)
    tokens, pads = tokens_of(1, 20), 13
    padded = torch.cat((torch.zeros(1, pads, dtype=torch.int64), tokens), dim=1)
    mask = (torch.arange(pads + 20) >= pads).long()[None]
    logits = model(padded, attention_mask=mask).logits[:, pads:]
    torch.testing.assert_close(logits, model(tokens).logits, atol=1e-5, rtol=1e-5)
    alone = model.generate(tokens, max_new_tokens=20, do_sample=False)[0, 20:]
    both = torch.cat((padded, tokens_of(1, pads + 20)))
    masks = torch.cat((mask, torch.ones_like(mask)))
    together = model.generate(both, attention_mask=masks, max_new_tokens=20, do_sample=False)[0, pads + 20 :]
    assert alone.tolist() == together.tolist()


def test_gradients_are_those_of_the_definition(model):
    convert(model)
    tokens = tokens_of(1, 40)
    with torch.enable_grad():
        model(tokens, labels=tokens).loss.backward()
        state = {name: tensor.double().requires_grad_() for name, tensor in model.state_dict().items()}
        if model.config.model_type == "gpt2":
            logits = gpt2_logits(state, tokens[0])
        else:
            logits = llama_logits(state, tokens[0])
        F.cross_entropy(logits[:-1], tokens[0, 1:]).backward()
    for name, parameter in model.named_parameters():
        if "wpe" in name:
            assert not parameter.grad.any()
        else:
            expected = state[name].grad
            if "wte" in name and state.get("lm_head.weight") is not None and state["lm_head.weight"].grad is not None:
                expected = expected + state["lm_head.weight"].grad
            # Keys' biases have none in exact numbers: softmax removes what all scores of a query share.
            assert (parameter.grad - expected).abs().max() < 1e-4 * expected.abs().max() + 1e-6


def test_fine_tuning_lowers_the_loss(model):
    convert(model).train()
    tokens = torch.arange(96).remainder(7)[None] + 5  # past the length trained at, too
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    with torch.enable_grad():
        for _ in range(25):
            loss = model(tokens, labels=tokens).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # the name in every version of today
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_gradient_checkpointing_gives_the_same_gradients(kind):
    model = convert(MODELS[kind]()).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    tokens, gradients = tokens_of(1, 20), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        with torch.enable_grad():
            model(tokens, labels=tokens, use_cache=False).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_saved_and_loaded_again_a_model_says_what_it_is(model, tmp_path):
    tokens = tokens_of(1, 20)
    expected = convert(model)(tokens).logits
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.longreach_positions == "alibi"
    assert type(loaded).__name__ == type(model).__name__
    assert torch.equal(convert(loaded)(tokens).logits, expected)


def test_a_converted_model_can_be_extended(model):
    tokens = tokens_of(1, 3 * TRAINED)
    plain = convert(model)(tokens).logits
    longer = extend(model, scaling="linear", train_length=TRAINED)(tokens).logits
    assert (longer - plain).abs().max() > 1e-3
    assert torch.equal(convert(model, scaling="linear", train_length=TRAINED)(tokens).logits, longer)
    assert torch.equal(convert(model)(tokens).logits, plain)
    restore(model)
    assert unconvert(model) is model


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # by peft
def test_a_peft_model_is_converted_through_its_wrapping():
    model, tokens = gpt2(), tokens_of(1, 20)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    expected = golden(gpt2(), tokens)
    assert (convert(wrapped)(tokens).logits - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: gpt2(add_cross_attention=True), "add_cross_attention=True: only a GPT-2 that is a plain decoder"),
        (
            lambda: llama_like(transformers.MistralForCausalLM, transformers.MistralConfig, sliding_window=16),
            "sliding_window=16: ALiBi is made for layers that see everything",
        ),
        (
            lambda: llama_like(
                transformers.Qwen2ForCausalLM,
                transformers.Qwen2Config,
                use_sliding_window=True,
                sliding_window=16,
                max_window_layers=1,
            ),
            "sliding_window=16",
        ),
        (
            lambda: transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=9, hidden_size=8, n_head=2)),
            "BloomForCausalLM is none of gpt2, llama, mistral, qwen2",
        ),
        (lambda: torch.nn.Linear(2, 2), "Linear is none of gpt2"),
    ],
)
def test_models_that_are_refused_are_untouched(build, message):
    model = build()
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        convert(model)
    assert [type(module) for module in model.modules()] == classes
    assert not hasattr(getattr(model, "config", None), "longreach_positions")


@pytest.mark.parametrize("options", [{"scaling": "cubic"}, {"sinks": 4}, {"length": 0}])
def test_wrong_options_leave_the_model_untouched(model, options):
    tokens = tokens_of(1, 9)
    before = model(tokens).logits
    with pytest.raises(ValueError, match=next(iter(options))):
        convert(model, **options)
    assert torch.equal(model(tokens).logits, before)
    assert not hasattr(model.config, "longreach_positions")


def test_a_wrong_option_leaves_a_converted_model_converted(model):
    tokens = tokens_of(1, 9)
    expected = convert(model)(tokens).logits
    with pytest.raises(ValueError, match="scaling"):
        convert(model, scaling="cubic")
    assert torch.equal(model(tokens).logits, expected)
    assert model.config.longreach_positions == "alibi"


def test_undoing_nothing_is_refused(model):
    with pytest.raises(ValueError, match=r"ForCausalLM is not converted|LMHeadModel is not converted"):
        unconvert(model)


def test_a_model_with_its_own_positions_is_not_extended(model):
    with pytest.raises(ValueError, match=r"(learned|rotary) positions and no ALiBi: longreach.convert"):
        extend(model, scaling="linear", train_length=TRAINED)


@pytest.mark.parametrize("by", ["argument", "configuration"])
def test_attention_weights_give_the_outputs(model, by):
    convert(model)
    ids, given = tokens_of(2, 9), {}
    expected = model(ids).logits
    if by == "argument":
        given = {"output_attentions": True}
    else:
        model.set_attn_implementation("eager")
        model.config.output_attentions = True
    out = model(ids, **given)
    torch.testing.assert_close(out.logits, expected, rtol=0, atol=2e-5)
    assert [weights.shape for weights in out.attentions] == [(2, HEADS, 9, 9)] * 2
    for weights in out.attentions:
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, HEADS, 9))


@pytest.mark.parametrize("kind", ["float", "bool", "float for each head"])
def test_masks_of_four_axes_say_what_is_seen(model, kind):
    """Here two documents in one row, whose distances to each other do not matter."""
    convert(model)
    ids = tokens_of(2, 12)
    seen = torch.zeros(12, 12, dtype=torch.bool)
    seen[:7, :7] = seen[7:, 7:] = True
    mask = seen.tril().expand(2, 1, 12, 12)
    if kind != "bool":
        mask = (~mask).float() * torch.finfo(torch.float32).min
    if kind == "float for each head":
        mask = mask.expand(2, HEADS, 12, 12)
    alone = torch.cat((model(ids[:, :7]).logits, model(ids[:, 7:]).logits), dim=1)
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, alone, rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match=r"give \(2, 1, 11, 11\), with what the cache holds"):
        model(ids[:, :11], attention_mask=mask)
