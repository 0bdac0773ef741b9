import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from rich.console import Console

from longreach.cli import main
from longreach.data.corpora import open_corpus
from longreach.data.tokenizer import train_tokenizer
from longreach.measure.bootstrap import Units
from longreach.verbs.doctor import DoctorConfig, Trial, examine, print_checkup, read_tokens

TRAIN_LENGTH = 16


def save(model, folder, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save(folder / "tokenizer.json")
    return str(folder)


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return train_tokenizer([path.read_text() for path in sorted(corpus.glob("*.txt"))], 300)


@pytest.fixture(scope="module")
def text(corpus):
    return str(corpus / "00.txt")


def large_weights(model):
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25, generator=generator)
    return model


@pytest.fixture(scope="module")
def bloom(tokenizer, tmp_path_factory):
    config = transformers.BloomConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, n_layer=1, n_head=4, seq_length=TRAIN_LENGTH
    )
    model = large_weights(transformers.BloomForCausalLM(config))
    return save(model, tmp_path_factory.mktemp("models") / "bloom", tokenizer)


@pytest.fixture(scope="module")
def mpt(tokenizer, tmp_path_factory):
    """20 heads, in bfloat16."""
    config = transformers.MptConfig(
        vocab_size=tokenizer.vocab_size, d_model=80, n_layers=2, n_heads=20, max_seq_len=TRAIN_LENGTH
    )
    model = large_weights(transformers.MptForCausalLM(config)).bfloat16()
    return save(model, tmp_path_factory.mktemp("models") / "mpt", tokenizer)


def page(checkup, width):
    out = io.StringIO()
    print_checkup(checkup, Console(file=out, width=width))
    return out.getvalue()


def test_the_page_answers_all_four_questions(mpt, text):
    checkup = examine(DoctorConfig(mpt, text=text, valid_lengths=(TRAIN_LENGTH, 96)))
    for width in (80, 120):
        shown = page(checkup, width)
        assert max(map(len, shown.splitlines())) <= width
        assert len(shown.splitlines()) < 60
        flat = " ".join(shown.split())
        assert "mpt, bfloat16, trained at 16 tokens" in flat
        assert "20 heads, 0.841 to 0.00391: the paper's rule" in flat
        assert "16 right" in flat
        assert "crashes: past its configured length of 16" in flat
        assert "static cache: works" in flat
        assert "KL of" in flat  # of the extended model, in bfloat16
        assert "0.841 " in flat
        assert re.search(r"0\.\d+ to 0\.\d+ ", flat.split("Reach of its heads")[1])  # 20 heads in 16 rows
        assert "all heads" in flat
        assert "Perplexity past the training length" in flat
        assert 'At 96: longreach.extend(model, scaling="' in flat


def test_without_text_there_is_no_recommendation(bloom):
    checkup = examine(DoctorConfig(bloom))
    assert [run.length for run in checkup.diagnosis.runs] == [TRAIN_LENGTH, 2 * TRAIN_LENGTH]
    assert checkup.trials == ()
    shown = page(checkup, 80)
    assert "no recommendation, for random tokens cannot tell: give --text" in shown
    assert "Perplexity" not in shown


def test_up_to_the_training_length_no_scaling_is_needed(bloom, text):
    checkup = examine(DoctorConfig(bloom, text=text, valid_lengths=(8, TRAIN_LENGTH)))
    assert checkup.trials == ()
    assert "none is needed up to the training length of 16 tokens" in page(checkup, 80)


def test_perplexities_are_those_of_models_with_scaled_slopes(bloom, text, tokenizer, scale_bloom_bias):
    """The stock code's own bias is multiplied here, which knows nothing of scalings."""
    length = 64
    checkup = examine(DoctorConfig(bloom, text=text, valid_lengths=(length,)))
    ids = torch.from_numpy(read_tokens(open_corpus(text), tokenizer, 4 * length + 1, 4 * length + 1))
    assert checkup.tokens == 4 * length
    model = transformers.BloomForCausalLM.from_pretrained(bloom).eval()
    stretch = length / TRAIN_LENGTH
    steepest_kept = torch.tensor([stretch ** -(head / 3) for head in range(4)])

    def perplexity(window, factor):
        nll = []
        scale_bloom_bias(factor)
        with torch.no_grad():
            for start in range(0, 4 * length, window):
                piece = ids[start : start + window + 1]
                nll.append(torch.nn.functional.cross_entropy(model(piece[None, :-1]).logits[0], piece[1:]))
        return math.exp(sum(nll) / len(nll))

    assert checkup.base_perplexity == pytest.approx(perplexity(TRAIN_LENGTH, 1.0), rel=1e-4)
    (trial,) = checkup.trials
    expected = [perplexity(length, factor) for factor in (1.0, 1 / stretch, steepest_kept)]
    assert trial.perplexity == pytest.approx(expected, rel=1e-4)
    assert trial.helps == (min(expected) < checkup.base_perplexity)


def test_what_the_text_cannot_tell_apart_is_not_told_apart():
    from longreach.verbs.doctor import _indistinguishable

    drawn = Units(np.repeat(np.arange(40), 5), "40 blocks of 5 tokens")
    noise = np.random.default_rng(0).normal(size=200)
    steady = np.stack([noise + 1.0, noise + 0.5, noise], axis=1)
    assert _indistinguishable(steady, drawn) == ("ntk",)
    independent = np.random.default_rng(1).normal([0.0, 0.0, 5.0], size=(200, 3))
    assert _indistinguishable(independent, drawn) == ("none", "linear")
    assert _indistinguishable(steady, Units(np.zeros(200, dtype=np.int64), "1 block")) == ("none", "linear", "ntk")


def test_advice_names_the_simplest_and_says_when_nothing_helps(bloom):
    checkup = replace(examine(DoctorConfig(bloom)), base_perplexity=9.0, tokens=100)
    sure = replace(checkup, trials=(Trial(32, (12.0, 11.0, 8.0), ("ntk",), helps=True),))
    assert page(sure, 120).splitlines()[-1] == 'At 32: longreach.extend(model, scaling="ntk").'
    unsure = replace(checkup, trials=(Trial(32, (12.0, 9.6, 9.5), ("linear", "ntk"), helps=False),))
    last = " ".join(page(unsure, 80).split("At 32: ")[-1].split())
    assert last == (
        'longreach.extend(model, scaling="linear"); this text cannot tell it from ntk (lowest: ntk). None predicts '
        "better than windows of 16 do: expect no gain from the longer context."
    )


def test_a_training_length_that_the_configuration_does_not_tell_is_part_of_the_advice(bloom):
    checkup = replace(examine(DoctorConfig(bloom, train_length=24)), base_perplexity=9.0, tokens=100)
    for advised, told in (("none", "train_length=24"), ("ntk", 'scaling="ntk", train_length=24')):
        shown = page(replace(checkup, trials=(Trial(32, (12.0, 11.0, 8.0), (advised,), helps=True),)), 120)
        assert shown.splitlines()[-1] == f"At 32: longreach.extend(model, {told})."


def test_a_model_is_tried_as_its_configuration_says(bloom, text, tokenizer, tmp_path, scale_bloom_bias):
    model = transformers.BloomForCausalLM.from_pretrained(bloom)
    model.config.alibi_scaling = {"type": "linear", "factor": 4.0}
    folder = save(model, tmp_path / "scaled", tokenizer)
    checkup = examine(DoctorConfig(folder, text=text, valid_lengths=(64,)))
    assert checkup.diagnosis.runs[0].mistake == "alibi_scaling is ignored"
    assert "64 wrong: alibi_scaling is ignored" in " ".join(page(checkup, 120).split())
    unscaled = examine(DoctorConfig(bloom, text=text, valid_lengths=(64,)))
    # 64 tokens are 4 times the training length: "linear" divides the slopes by 4 as well.
    assert checkup.trials[0].perplexity[0] == pytest.approx(unscaled.trials[0].perplexity[1], rel=1e-6)
    assert checkup.trials[0].perplexity[1:] == pytest.approx(unscaled.trials[0].perplexity[1:], rel=1e-6)


@pytest.mark.parametrize(
    ("options", "told"),
    [({"logit_scale": 0.5}, "logit_scale=0.5"), ({"attn_config": {"qk_ln": True}}, "attn_config.qk_ln=True")],
)
def test_what_transformers_leaves_out_of_an_mpt_is_named(options, told, tokenizer, tmp_path, capsys):
    config = transformers.MptConfig(vocab_size=tokenizer.vocab_size, d_model=16, n_layers=1, n_heads=2, **options)
    folder = save(transformers.MptForCausalLM(config), tmp_path / "mpt", tokenizer)
    with pytest.raises(SystemExit, match="2"):
        main(["doctor", folder])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"longreach doctor: {told}: transformers' own code does not compute it")


def test_documents_of_a_text_are_parted_by_eos(tmp_path, tokenizer):
    lines = [json.dumps({"text": text}) for text in ("document 1 line 2", "sum of 1")]
    (tmp_path / "two.jsonl").write_text("\n".join(lines))
    first, second = (tokenizer.encode(text) for text in ("document 1 line 2", "sum of 1"))
    expected = [*first, tokenizer.eos_id, *second, tokenizer.eos_id]
    corpus = open_corpus(str(tmp_path / "two.jsonl"))
    assert read_tokens(corpus, tokenizer, 2, 1000).tolist() == expected
    assert read_tokens(corpus, tokenizer, 2, 3).tolist() == expected[:3]


def test_the_text_may_stand_in_another_field_and_bad_lines_are_left_out(bloom, text, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("{\n" + json.dumps({"body": Path(text).read_text()}))
    config = DoctorConfig(bloom, text=str(path), text_field="body", valid_lengths=(8,))
    with pytest.raises(ValueError, match=r"^text: .*:1 is not JSON .* \(--skip-bad\)$"):
        examine(config)
    told = []
    examine(replace(config, skip_bad=True), lambda stage, *_: told.append(stage))
    assert told[0] == f"left out 1 bad file or line: {path}:1"
    for option in ({"text_field": "body"}, {"skip_bad": True}):
        with pytest.raises(ValueError, match=r"^(text_field=body|skip_bad=True): it is for text; give that too"):
            DoctorConfig(bloom, **option)


def test_the_verb_prints_the_page(bloom, text, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    main(["doctor", bloom, "--text", text, "--lengths", "16,32", "--max-memory", "1"])
    shown = capsys.readouterr().out
    assert shown.startswith(f"{bloom[:40]}")
    assert "Reach of its heads" in shown
    assert "At 32: longreach.extend(" in shown


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--lengths", "1"], "--lengths has 1: give lengths of 2 tokens at least"),
        (["--lengths", "8,999999"], "tokens, the lengths need 1,000,000: give more, or shorter ones"),
        (["--max-memory", "0"], "--max-memory=0: give a positive number of GiB"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--dtype", "float3"], "dtype='float3'"),
    ],
)
def test_mistakes_of_the_user_are_one_line(options, told, bloom, text, capsys):
    text_given = [] if "--text" in options else ["--text", text]
    with pytest.raises(SystemExit, match="2"):
        main(["doctor", bloom, *text_given, *options])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("longreach doctor: ")
    assert told in error


def test_a_model_without_alibi_is_refused_in_one_line(tokenizer, tmp_path, capsys):
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    folder = save(transformers.LlamaForCausalLM(config), tmp_path / "llama", tokenizer)
    with pytest.raises(SystemExit, match="2"):
        main(["doctor", folder])
    assert "llama" in capsys.readouterr().err.strip().splitlines()[-1]
