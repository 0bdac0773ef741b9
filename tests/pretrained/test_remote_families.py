"""BTLM, JAIS and Baichuan-13B, whose code is no part of transformers: stand-ins with its attributes and signatures.

The stand-ins compute attention densely, in the absolute or relative form that the family uses, and keep keys and
values in tuples.
"""

import types

import pytest
import torch
import transformers
from family_models import paper_slopes, tokens
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

import longreach
from longreach.positions.scaling import Scaling
from longreach.pretrained.attend import extension_of, fixed_length

pytestmark = pytest.mark.usefixtures("without_gradients")

CLOSE = {"rtol": 0, "atol": 2e-5}
HEADS, WIDTH, LIMIT = 6, 24, 64


class Conv1D(nn.Module):
    """A linear layer with its weight the other way round, as in GPT-2."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


class JAISAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.register_buffer("bias", torch.ones(LIMIT, LIMIT, dtype=torch.bool).tril()[None, None], persistent=False)
        self.split_size, self.num_heads, self.head_dim = WIDTH, HEADS, WIDTH // HEADS
        self.scale_attn_weights = config.scale_attn_weights
        self.scale_attn_by_inverse_layer_idx = config.scale_attn_by_inverse_layer_idx
        self.attn_scale_power = 1.0 if config.mup_scale_qk_dot_by_d else 0.5
        self.layer_idx = layer_idx
        self.c_attn, self.c_proj = Conv1D(3 * WIDTH, WIDTH), Conv1D(WIDTH, WIDTH)
        self.attn_dropout, self.resid_dropout = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(
        self,
        hidden_states,
        layer_past=None,
        attention_mask=None,
        head_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        use_cache=False,
        output_attentions=False,
        position_bias=None,
    ):
        q, k, v = (
            x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x in self.c_attn(hidden_states).split(self.split_size, dim=2)
        )
        if layer_past is not None:
            k, v = torch.cat((layer_past[0], k), dim=2), torch.cat((layer_past[1], v), dim=2)
        scores = q @ k.mT
        if self.scale_attn_weights:
            scores = scores / self.head_dim**self.attn_scale_power
        if self.scale_attn_by_inverse_layer_idx:
            scores = scores / (self.layer_idx + 1)
        visible = self.bias[:, :, k.shape[2] - q.shape[2] : k.shape[2], : k.shape[2]]
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min) + position_bias
        if attention_mask is not None:
            scores = scores + attention_mask
        out = self.c_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return self.resid_dropout(out), (k, v) if use_cache else None


class AlibiPositionEmbeddingLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.slopes = nn.Parameter(torch.tensor(paper_slopes(HEADS))[:, None], requires_grad=False)
        self.alibi_scaling = config.alibi_scaling

    def forward(self, seq_length, key_length, cached_length):
        length = key_length + cached_length
        distance = torch.arange(cached_length, length)[:, None] - torch.arange(length)
        scale = 1.0
        if self.alibi_scaling is not None:
            scale = self.alibi_scaling.get("factor") or max(1.0, length / self.alibi_scaling["train_seq_len"])
        return -self.slopes[:, None] / scale * distance.abs()  # [H, Tq, Tk]


class JAISBlock(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.ln_1 = nn.LayerNorm(WIDTH)
        self.attn = JAISAttention(config, layer_idx)

    def forward(self, x, layer_past=None, attention_mask=None, use_cache=False, position_bias=None):
        out, present = self.attn(
            self.ln_1(x),
            layer_past=layer_past,
            attention_mask=attention_mask,
            head_mask=None,
            use_cache=use_cache,
            position_bias=position_bias,
        )
        return x + out, present


class JAISModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(50, WIDTH)
        self.relative_pe = AlibiPositionEmbeddingLayer(config) if config.position_embedding_type == "alibi" else None
        self.h = nn.ModuleList(JAISBlock(config, n) for n in range(2))

    def forward(self, input_ids, past_key_values=None, attention_mask=None, position_ids=None, use_cache=False):
        past = [None] * len(self.h) if past_key_values is None else past_key_values
        x = self.wte(input_ids)
        if attention_mask is not None:
            attention_mask = (1.0 - attention_mask[:, None, None].to(x.dtype)) * torch.finfo(x.dtype).min
        length = input_ids.shape[1]
        bias = self.relative_pe(length, length, 0 if past[0] is None else past[0][0].shape[2])
        presents = []
        for block, layer_past in zip(self.h, past, strict=True):
            x, present = block(x, layer_past, attention_mask, use_cache, bias)
            presents.append(present)
        return x @ self.wte.weight.T, presents


class BaichuanAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim = HEADS, WIDTH // HEADS
        self.W_pack, self.o_proj = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(
        self, hidden_states, attention_mask=None, past_key_value=None, output_attentions=False, use_cache=False
    ):
        q, k, v = (y.transpose(1, 2) for y in self.W_pack(hidden_states).unflatten(-1, (3, HEADS, -1)).unbind(2))
        if past_key_value is not None:
            k, v = torch.cat((past_key_value[0], k), dim=2), torch.cat((past_key_value[1], v), dim=2)
        scores = q @ k.mT / self.head_dim**0.5
        scores = scores + (attention_mask[..., -1:, :] if q.shape[2] == 1 else attention_mask)
        out = self.o_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return out, None, (k, v) if use_cache else None


class BaichuanLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn, self.input_layernorm = BaichuanAttention(), nn.LayerNorm(WIDTH)

    def forward(self, x, attention_mask=None, past_key_value=None, use_cache=False):
        out, _, present = self.self_attn(
            hidden_states=self.input_layernorm(x),
            attention_mask=attention_mask,
            past_key_value=past_key_value,
            use_cache=use_cache,
        )
        return x + out, present


class BaichuanModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(50, WIDTH)
        self.layers = nn.ModuleList(BaichuanLayer() for _ in range(2))
        self.alibi_mask = None

    def get_alibi_mask(self, tensor, seq_length_with_past):
        n = seq_length_with_past
        mask = torch.tensor(paper_slopes(HEADS))[:, None, None] * torch.arange(n).expand(1, n, n)
        return mask.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), float("-inf"))  # [H, T, T]

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=False):
        past = [None] * len(self.layers) if past_key_values is None else past_key_values
        x = self.embed_tokens(input_ids)
        length = input_ids.shape[1] + (0 if past[0] is None else past[0][0].shape[2])
        if self.training:
            if self.alibi_mask is None or self.alibi_mask.shape[-1] != length:
                self.alibi_mask = self.get_alibi_mask(x, length)
            mask = self.alibi_mask
        else:
            mask = self.get_alibi_mask(x, length)
        if attention_mask is not None:
            rows, columns = attention_mask[:, :, None], attention_mask[:, None]
            seen = (rows * columns > 0) & (rows == columns)  # documents of a row may have numbers of their own
            mask = mask + (1.0 - seen[:, None].float()) * torch.finfo(torch.float32).min
        presents = []
        for layer, past_key_value in zip(self.layers, past, strict=True):
            x, present = layer(x, mask, past_key_value, use_cache)
            presents.append(present)
        return x @ self.embed_tokens.weight.T, presents


def jais(**options):
    config = {
        "model_type": "jais",
        "position_embedding_type": "alibi",
        "alibi_scaling": None,
        "mup_scale_qk_dot_by_d": True,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "n_positions": LIMIT,
    }
    return ready(JAISModel(types.SimpleNamespace(**{**config, **options})))


def baichuan():
    return ready(BaichuanModel(types.SimpleNamespace(model_type="baichuan", model_max_length=LIMIT)))


def ready(model):
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "slopes" not in name:
            nn.init.normal_(parameter, std=0.3, generator=generator)
    return model.eval()


class CausalLM(transformers.PreTrainedModel, transformers.GenerationMixin):
    """What generates with a stand-in."""

    def __init__(self, base):
        super().__init__(transformers.PretrainedConfig(num_hidden_layers=2, vocab_size=50))
        self.model = base

    def forward(self, input_ids, past_key_values=None, attention_mask=None, use_cache=None, **options):
        logits, presents = self.model(
            input_ids, past_key_values=past_key_values, attention_mask=attention_mask, use_cache=use_cache
        )
        return CausalLMOutputWithPast(logits=logits, past_key_values=tuple(presents) if use_cache else None)

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, attention_mask=None, **options):
        return {
            "input_ids": input_ids[:, -1:] if past_key_values else input_ids,
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "use_cache": options.get("use_cache"),
        }


MODELS = {"jais": jais, "btlm": lambda: jais(model_type="btlm", mup_scale_qk_dot_by_d=False), "baichuan": baichuan}


@pytest.fixture(params=MODELS)
def remote(request):
    return MODELS[request.param]()


def test_equals_stock_and_is_restored(remote):
    ids, mask = tokens(2, 40), torch.ones(2, 40, dtype=torch.long)
    stock, keys = remote(ids)[0], remote.state_dict().keys()
    mask[0, :11] = 0
    padded = remote(ids, attention_mask=mask)[0]
    attributes = [dict(vars(module)) for module in remote.modules()]
    longreach.extend(remote, scaling="none")
    assert remote.state_dict().keys() == keys
    torch.testing.assert_close(remote(ids)[0], stock, **CLOSE)
    torch.testing.assert_close(remote(ids, attention_mask=torch.ones_like(mask))[0], stock, **CLOSE)
    torch.testing.assert_close(remote(ids, attention_mask=mask)[0][0, 11:], padded[0, 11:], **CLOSE)
    longreach.restore(remote)
    assert [dict(vars(module)) for module in remote.modules()] == attributes
    assert torch.equal(remote(ids)[0], stock)


@pytest.mark.parametrize("options", [{"scale_attn_weights": False}, {"scale_attn_by_inverse_layer_idx": True}])
def test_scales_of_jais(options):
    model, ids = jais(**options), tokens(1, 30)
    stock = model(ids)[0]
    longreach.extend(model, scaling="none")
    torch.testing.assert_close(model(ids)[0], stock, **CLOSE)


@pytest.mark.parametrize(
    ("alibi_scaling", "arguments"),
    [
        ({"type": "linear", "factor": 3.0}, {"scaling": "linear-fixed=3"}),
        ({"type": "linear", "train_seq_len": 16}, {"scaling": "linear"}),
    ],
)
def test_scaling_equals_the_alibi_scaling_of_its_own_configuration(alibi_scaling, arguments):
    model, ids = jais(alibi_scaling=alibi_scaling), tokens(1, 50)
    stock = model(ids)[0]
    longreach.extend(model, **arguments)
    torch.testing.assert_close(model(ids)[0], stock, **CLOSE)


def test_training_length_of_the_configuration():
    assert extension_of(longreach.extend(jais(), scaling="linear")).scaling == Scaling("linear", LIMIT)
    dynamic = jais(alibi_scaling={"type": "linear", "train_seq_len": 16})
    assert extension_of(longreach.extend(dynamic)).scaling == Scaling("linear", 16)
    assert extension_of(longreach.extend(baichuan(), scaling="linear")).scaling == Scaling("linear", LIMIT)


def test_past_the_limit_decoding_equals_the_full_forward_pass(remote):
    longreach.extend(remote, scaling="linear")
    ids = tokens(1, 90)
    full, cache, pieces = remote(ids)[0], None, []
    with fixed_length(remote, 90):
        for piece in ids.split([70, 17, 1, 1, 1], 1):
            logits, cache = remote(piece, past_key_values=cache, use_cache=True)
            pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, **CLOSE)
    with pytest.raises(ValueError, match="not stated"):
        remote(ids[:, :1], past_key_values=cache)


def test_generation_begins_with_tuples_where_the_stock_code_is_handed_a_cache(remote):
    model, ids = CausalLM(remote), tokens(2, 20)
    mask, seen = torch.ones_like(ids), []
    mask[0, :5] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with pytest.raises(TypeError, match="not subscriptable"):
        model.generate(ids, **options)
    longreach.extend(model, scaling="linear", train_length=16)
    remote.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    whole = model.generate(ids, **options, use_cache=False)
    assert torch.equal(model.generate(ids, **options), whole)
    assert seen == [*range(20, 26), 20, 1, 1, 1, 1, 1]


def test_training_sees_the_padding_of_each_batch():
    """Baichuan keeps its mask from one training step to the next of the same length."""
    model, ids, mask = baichuan(), tokens(1, 20), torch.ones(1, 20, dtype=torch.long)
    longreach.extend(model, scaling="none")
    mask[0, :5] = 0
    expected = [model(ids, attention_mask=mask)[0], model(ids)[0]]
    model.train()
    assert torch.equal(model(ids, attention_mask=mask)[0], expected[0])
    assert torch.equal(model(ids)[0], expected[1])
    longreach.restore(model)
    assert model.alibi_mask is None


def test_what_is_not_known_is_refused():
    with pytest.raises(ValueError, match="position_embedding_type='learned': this model has no ALiBi"):
        longreach.extend(jais(position_embedding_type="learned"))
    model = jais()
    del model.h[1].attn.split_size
    with pytest.raises(ValueError, match="JAISAttention has no 'split_size'"):
        longreach.extend(model)
    with pytest.raises(ValueError, match="sinks=4: jais caches in tuples"):
        longreach.extend(jais(), sinks=4, window=16)
    model = baichuan()
    model.layers[0].self_attn.rotary_emb = nn.Identity()
    with pytest.raises(ValueError, match="rotary positions"):
        longreach.extend(model)
    model = baichuan()
    model.layers[1].self_attn = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="Linear has no 'W_pack'"):
        longreach.extend(model)
    model, numbers = longreach.extend(baichuan()), torch.tensor([[1, 1, 2, 2]])
    with pytest.raises(ValueError, match=r"attention_mask holds 2: .* packed documents by position_ids"):
        model(tokens(1, 4), attention_mask=numbers)
    model = longreach.extend(jais())
    with pytest.raises(ValueError, match="position_ids pack documents"):
        model(tokens(1, 4), position_ids=torch.tensor([[0, 1, 0, 1]]))
