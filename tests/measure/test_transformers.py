import json
import sys
from functools import partial

import huggingface_hub.constants
import numpy as np
import pytest
import safetensors.torch
import torch
from tiny_subjects import CPU, LENGTH, tokenizer, transformers_model

from longreach.measure.score import score, score_stream
from longreach.measure.subject import Unsupported
from longreach.measure.transformers import HuggingFaceModel
from longreach.pretrained.attend import fixed_length
from longreach.pretrained.extend import extend
from longreach.verbs.open import load_subject

TOKENS = torch.tensor([[7, 3, 250, 9, 9, 30, 41, 2, 77, 5], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]])


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def saved(model, folder):
    model.save_pretrained(folder)
    tokenizer().save(folder / "tokenizer.json")
    return str(folder)


@torch.inference_mode()
def whole_logits(model, tokens, **options):
    return model(tokens, **options).logits


@torch.inference_mode()
def joined(model, tokens, chunk_size, **options):
    stretches = list(model.logits(tokens, chunk_size, **options))
    assert all(stretch.shape[1] <= chunk_size for stretch in stretches)
    return torch.cat(stretches, dim=1)


PLAIN = ["gpt2", "llama", "bloom", "opt", "mpt", "mamba"]
SCALED_OR_CAPPED = ["gemma2", "granite"]


@pytest.mark.parametrize("family", PLAIN + SCALED_OR_CAPPED)
@pytest.mark.parametrize("last", [None, 4])
def test_logits_are_those_of_the_model(family, last):
    model = transformers_model(family)
    expected = whole_logits(model, TOKENS, use_cache=False)[:, -(last or TOKENS.shape[1]) :]
    torch.testing.assert_close(joined(HuggingFaceModel(model), TOKENS, 3, last=last), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", PLAIN)
def test_only_a_stretch_of_logits_is_made_at_a_time(family):
    model = transformers_model(family)
    subject = HuggingFaceModel(model)
    made = []
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: made.append(output.shape[1]))
    joined(subject, TOKENS, 3)
    assert made == [3, 3, 3, 1]
    made.clear()
    joined(subject, TOKENS, 3, last=4)
    assert made == [3, 1]


@pytest.mark.parametrize("family", SCALED_OR_CAPPED)
def test_where_logits_are_changed_afterwards_the_scored_ones_alone_are_made(family):
    model = transformers_model(family)
    subject = HuggingFaceModel(model)
    made = []
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: made.append(output.shape[1]))
    joined(subject, TOKENS, 3, last=4)
    assert made == [4]


def test_nll_is_the_loss_that_transformers_gives():
    model = transformers_model("llama")
    with torch.inference_mode():
        expected = model(TOKENS[:1], labels=TOKENS[:1]).loss.item()
    scores = score(
        HuggingFaceModel(model),
        TOKENS[0].numpy(),
        valid_length=9,
        stride=9,
        vocab_size=tokenizer().vocab_size,
        device=CPU,
        tokens_per_batch=9,
    )
    assert scores.nll.mean() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom", "falcon", "mpt", "gemma2"])
def test_a_stream_through_a_cache_is_one_long_forward(family):
    model = HuggingFaceModel(transformers_model(family))
    expected = joined(model, TOKENS, 100)
    cache = model.new_cache(TOKENS.shape[1])
    parts = [joined(model, part, 100, cache=cache) for part in TOKENS.split([4, 1, 5], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_offset_positions_are_rows_further_down_the_table(family):
    model = transformers_model(family)
    subject = HuggingFaceModel(model)
    shifted = joined(subject, TOKENS, 100, positions=torch.arange(5, 15)[None])
    assert not torch.allclose(shifted, joined(subject, TOKENS, 100))
    table = next(
        module
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding) and module is not model.get_input_embeddings()
    )
    with torch.no_grad():
        table.weight.copy_(table.weight.roll(-5, dims=0))
    torch.testing.assert_close(shifted, joined(subject, TOKENS, 100), rtol=1e-5, atol=1e-5)


def test_positions_that_stand_still_do_not_cut_the_sequence():
    model = HuggingFaceModel(transformers_model("llama"))
    positions = torch.tensor([[0, 1, 2, 3, 3, 3, 3, 3, 3, 3]])
    other = TOKENS.clone()
    other[:, 0] += 1
    one, two = (joined(model, tokens, 100, positions=positions) for tokens in (TOKENS, other))
    assert not torch.allclose(one[:, -1], two[:, -1])
    cache = model.new_cache(TOKENS.shape[1])
    parts = [
        joined(model, tokens, 100, positions=places, cache=cache)
        for tokens, places in zip(TOKENS.split(4, dim=1), positions.split(4, dim=1), strict=True)
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["bloom", "falcon", "mpt", "mamba"])
def test_positions_are_refused_by_models_that_do_not_look_at_them(family):
    model = HuggingFaceModel(transformers_model(family))
    with pytest.raises(Unsupported, match="takes no positions: measure it without offsets"):
        joined(model, TOKENS, 100, positions=torch.arange(10)[None])


def banded_logits(model, max_context):
    """One forward pass in which each of TOKENS sees its last max_context tokens, by a mask that the model is given."""
    index = torch.arange(TOKENS.shape[1])
    hidden = (index[:, None] < index) | (index[:, None] - index >= max_context)
    if model.config.model_type == "mpt":
        mask = hidden[None, None]  # fills them itself
    else:
        mask = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)[None, None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[type(model).__module__], "create_causal_mask", lambda *_, **__: mask)
        return whole_logits(model, TOKENS)


WITH_ALIBI = ["bloom", "falcon", "mpt"]


@pytest.mark.parametrize("max_context", [1, 4, 9])
@pytest.mark.parametrize(
    ("family", "extended"),
    [(family, False) for family in ("gpt2", "llama", "opt", "gptj", "granite", *WITH_ALIBI)]
    + [(family, True) for family in WITH_ALIBI],
)
def test_a_bounded_cache_shows_each_token_its_last_ones(family, max_context, extended):
    model = transformers_model(family)
    expected = banded_logits(model, max_context)
    state_length = None
    if extended:
        extend(model, train_length=LENGTH)
        state_length = partial(fixed_length, model)
    subject = HuggingFaceModel(model, state_length=state_length, heeds_positions=not extended)
    cache = subject.new_cache(TOKENS.shape[1], max_context)
    parts = [joined(subject, part, 3, cache=cache) for part in TOKENS.split([4, 1, 5], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-4)
    again = subject.new_cache(TOKENS.shape[1], max_context)
    torch.testing.assert_close(joined(subject, TOKENS, 3, last=2, cache=again), expected[:, -2:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", WITH_ALIBI)
def test_slopes_under_a_bounded_cache_are_scaled_for_what_a_token_sees(family):
    model = transformers_model(family)
    del next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))[1]
    # In one layer nothing comes along from before the window.
    extend(model, scaling="linear+logn", train_length=4)
    subject = HuggingFaceModel(model, state_length=partial(fixed_length, model), heeds_positions=False)
    cache = subject.new_cache(TOKENS.shape[1], 8)
    streamed = joined(subject, TOKENS, 100, cache=cache)
    with fixed_length(model, 8):
        windows = [joined(subject, TOKENS[:, max(0, stop - 8) : stop], 100, last=1) for stop in range(1, 11)]
    torch.testing.assert_close(streamed, torch.cat(windows, dim=1), rtol=1e-4, atol=1e-4)


def test_a_bounded_cache_takes_shifted_positions():
    model = transformers_model("gpt2")
    subject = HuggingFaceModel(model)
    stream = TOKENS[0].numpy()
    options = {"max_context": 4, "vocab_size": tokenizer().vocab_size, "device": CPU}
    right, shifted = (score_stream(subject, stream, **options, shifted=shifted) for shifted in (False, True))
    assert shifted.nll[:4].tolist() == right.nll[:4].tolist()  # until the window is full
    assert not np.isclose(shifted.nll[4:], right.nll[4:]).any()


def test_a_cache_that_slides_by_itself_cannot_be_bounded():
    model = HuggingFaceModel(transformers_model("gemma2"))
    with pytest.raises(Unsupported, match=r"max_context=4 with 10 tokens: .* score a sliding window instead"):
        model.new_cache(10, max_context=4)
    assert model.new_cache(10, max_context=10).get_seq_length() == 0


def test_models_without_keys_have_no_cache():
    with pytest.raises(Unsupported, match="MambaForCausalLM takes no past_key_values"):
        HuggingFaceModel(transformers_model("mamba")).new_cache(10)


def test_code_that_reads_tuples_has_no_cache():
    model = HuggingFaceModel(transformers_model("llama"))
    model.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: kwargs["past_key_values"][0][0].shape, with_kwargs=True
    )
    with pytest.raises(Unsupported, match="LlamaForCausalLM puts nothing into a cache of transformers"):
        model.new_cache(10)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in peft
def test_a_wrapped_model_is_used_as_a_whole():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(
        transformers_model("llama"),
        LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    subject = HuggingFaceModel(model)
    expected = whole_logits(model, TOKENS)
    torch.testing.assert_close(joined(subject, TOKENS, 3), expected)
    cache = subject.new_cache(TOKENS.shape[1])
    parts = [joined(subject, part, 3, cache=cache) for part in TOKENS.split(5, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "opt", "mpt", "gptj"])
def test_models_that_end_somewhere_say_where(family, tmp_path):
    subject = load_subject(saved(transformers_model(family), tmp_path), device=CPU)
    assert subject.max_length == subject.train_length == LENGTH
    joined(subject.model, torch.ones(1, LENGTH, dtype=torch.int64), 100)
    too_long = torch.ones(1, LENGTH + 1, dtype=torch.int64)
    with pytest.raises((IndexError, RuntimeError)):  # what it would be without the limit
        whole_logits(subject.model.model, too_long)
    with pytest.raises(ValueError, match=f"{LENGTH + 1} tokens: .* holds {LENGTH} positions; give fewer tokens"):
        joined(subject.model, too_long, 100)
    cache = subject.model.new_cache(LENGTH + 1)
    joined(subject.model, too_long[:, :LENGTH], 100, cache=cache)
    with pytest.raises(ValueError, match=f"{LENGTH + 1} tokens: .* holds {LENGTH} positions"):
        joined(subject.model, too_long[:, :1], 100, cache=cache)


def test_offsets_past_the_table_are_refused(tmp_path):
    subject = load_subject(saved(transformers_model("gpt2"), tmp_path), device=CPU)
    with pytest.raises(ValueError, match=f"{LENGTH + 1} tokens: GPT2LMHeadModel holds {LENGTH} positions"):
        joined(subject.model, TOKENS, 100, positions=torch.arange(LENGTH - 9, LENGTH + 1)[None])


@pytest.mark.parametrize("family", ["llama", "falcon"])
def test_other_models_have_no_limit(family, tmp_path):
    subject = load_subject(saved(transformers_model(family), tmp_path), device=CPU, train_length=LENGTH)
    assert subject.max_length is None
    joined(subject.model, torch.ones(1, 4 * LENGTH, dtype=torch.int64), 100)


def test_a_loaded_subject_knows_all_that_evaluation_needs(tmp_path):
    model = transformers_model("llama")
    subject = load_subject(saved(model, tmp_path), device=CPU)
    assert subject.name == str(tmp_path)
    assert subject.train_length == LENGTH
    assert subject.vocab_size == subject.tokenizer.vocab_size == tokenizer().vocab_size
    assert subject.attention(LENGTH, LENGTH, False) == "transformers sdpa"
    assert subject.tokenizer.encode("the sum") == tokenizer().encode("the sum")
    torch.testing.assert_close(joined(subject.model, TOKENS, 100), whole_logits(model, TOKENS))
    stream = np.arange(40, dtype=np.int64)
    scores = score_stream(subject.model, stream, max_context=None, vocab_size=subject.vocab_size, device=CPU)
    assert scores.context.tolist() == list(range(1, 40))


def test_a_subject_comes_in_the_dtype_of_its_files_or_in_the_one_asked_for(tmp_path):
    name = saved(transformers_model("llama").bfloat16(), tmp_path)
    assert load_subject(name, device=CPU).model.model.dtype == torch.bfloat16
    assert load_subject(name, device=CPU, dtype="float32").model.model.dtype == torch.float32
    with pytest.raises(ValueError, match="dtype='float31': give one of auto, float32"):
        load_subject(name, device=CPU, dtype="float31")


def test_the_training_length_can_stand_under_another_name_or_be_given(tmp_path):
    name = saved(transformers_model("bloom"), tmp_path)
    with pytest.raises(ValueError, match=r"does not say what length it was trained at: give it by --train-length"):
        load_subject(name, device=CPU)
    assert load_subject(name, device=CPU, train_length=32).train_length == 32
    with pytest.raises(ValueError, match="train_length=0: give a positive integer"):
        load_subject(name, device=CPU, train_length=0)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"seq_length": 48}))
    assert load_subject(name, device=CPU).train_length == 48
    (tmp_path / "config.json").write_text(json.dumps(config | {"seq_length": 48, "train_length": 24}))
    assert load_subject(name, device=CPU).train_length == 24


def test_a_training_length_below_the_longest_input_is_no_limit(tmp_path):
    model = transformers_model("mpt")
    model.config.train_length = LENGTH // 2
    subject = load_subject(saved(model, tmp_path), device=CPU)
    assert (subject.train_length, subject.max_length) == (LENGTH // 2, LENGTH)


def one_line_error(name, **options):
    with pytest.raises(ValueError, match=r".") as caught:
        load_subject(name, device=CPU, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_model_that_cannot_be_had_is_one_line(tmp_path, offline):
    assert "model 'nobody/nothing' is no folder here, nor to be had from the Hugging Face hub" in one_line_error(
        "nobody/nothing"
    )
    assert "is no folder here" in one_line_error(str(tmp_path / "missing"))
    assert "cannot be loaded from this folder" in one_line_error(str(tmp_path))


def test_files_that_are_missing_or_damaged_are_named(tmp_path):
    name = saved(transformers_model("llama"), tmp_path)
    weights_file = tmp_path / "model.safetensors"
    weights = safetensors.torch.load_file(weights_file)
    del weights["model.layers.0.mlp.up_proj.weight"]
    safetensors.torch.save_file(weights, weights_file, metadata={"format": "pt"})
    assert "there is no model.layers.0.mlp.up_proj.weight; give" in one_line_error(name)
    weights_file.write_bytes(weights_file.read_bytes()[:-100])
    assert "cannot be loaded from this folder" in one_line_error(name)
    weights_file.unlink()
    assert "cannot be loaded from this folder" in one_line_error(name)
    (tmp_path / "tokenizer.json").unlink()
    assert "tokenizer" in one_line_error(name)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    import transformers

    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=100, bos_token_id=0, eos_token_id=0)
    name = saved(transformers.AutoModelForCausalLM.from_config(config), tmp_path)
    assert (
        f"has 100 tokens and its tokenizer {tokenizer().vocab_size}: the tokenizer is not the model's"
        in one_line_error(name)
    )


def test_without_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'longreach[hf]'" in one_line_error("gpt2")
