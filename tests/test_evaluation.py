from dataclasses import replace

import pytest
import torch
import transformers

from longreach.compare import CompareConfig, compare
from longreach.data.prepare import DataConfig
from longreach.data.tokenizer import load_tokenizer
from longreach.evaluate.config import EvaluateConfig
from longreach.evaluation import EvaluationConfig, evaluate_models
from longreach.models.config import Architecture
from longreach.results import Results
from longreach.train.config import TrainConfig

EVALUATE = EvaluateConfig(valid_lengths=(16, 32), valid_tokens=256)


def silent(stage, done, total, note=""):
    pass


@pytest.fixture(scope="module")
def comparison(corpus, tmp_path_factory):
    """A folder with runs of two methods."""
    folder = tmp_path_factory.mktemp("comparison")
    cache = str(tmp_path_factory.mktemp("cache"))
    config = CompareConfig(
        methods=("alibi", "none"),
        data=DataConfig(data=str(corpus), vocab_size=300, valid_fraction=0.2, cache=cache),
        model=Architecture(num_layers=1, num_heads=2, d_model=16),
        train=TrainConfig(train_length=16, steps=3, batch_size=4, warmup_steps=1, device="cpu"),
        evaluate=EVALUATE,
    )
    compare(config, folder / "out", silent)
    return folder / "out"


@pytest.fixture(scope="module")
def elsewhere(comparison, tmp_path_factory):
    """A folder that transformers saved a model to, with the tokenizer of the runs."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tokenizer = load_tokenizer(comparison / "alibi" / "tokenizer.json")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save(folder / "tokenizer.json")
    return folder


def numbers(results):
    """What two evaluations must agree on."""
    return [(entry.key, getattr(entry, "nll", None)) for entry in results.entries()]


def test_runs_and_models_of_transformers_go_through_the_same_code(comparison, elsewhere, corpus, tmp_path):
    models = (str(comparison / "alibi"), str(comparison / "none"), str(elsewhere))
    config = EvaluationConfig(models=models, evaluate=EVALUATE, data=str(corpus))
    results = evaluate_models(config, tmp_path / "out", silent)
    assert results == Results.read(tmp_path / "out" / "results.json")
    assert results.methods() == ("alibi", "none", str(elsewhere))
    assert {record.tokens for record in results.records} == {256}
    assert len({record.bytes for record in results.records}) == 1  # the same text
    assert (tmp_path / "out" / "report.html").exists()


def test_without_data_runs_are_tested_on_their_own_validation_text(comparison):
    config = EvaluationConfig(models=(str(comparison / "alibi"),), evaluate=EVALUATE)
    compared = [entry for entry in Results.read(comparison / "results.json").records if entry.method == "alibi"]
    assert [(r.key, r.nll, r.bytes) for r in evaluate_models(config, None, silent).records] == [
        (r.key, r.nll, r.bytes) for r in compared
    ]


def test_interrupted_it_goes_on_and_nothing_is_measured_twice(comparison, tmp_path):
    config = EvaluationConfig(
        models=(str(comparison / "alibi"), str(comparison / "none")),
        evaluate=replace(EVALUATE, tasks=("perplexity", "positions"), strides=(4,)),
    )
    whole = evaluate_models(config, None, silent)
    stages = []

    def interrupting(stage, done, total, note=""):
        if stage not in stages:
            stages.append(stage)
            if stage.startswith("testing"):
                raise KeyboardInterrupt

    interrupts = 0
    while True:
        try:
            results = evaluate_models(config, tmp_path / "out", interrupting)
            break
        except KeyboardInterrupt:
            interrupts += 1
    # Each model is scored in windows of 16 and 32, each by strides of 4 and of its length, and at 16 by the capped 2.
    assert interrupts == 2 * 5
    assert numbers(results) == numbers(whole)
    stages.clear()
    assert evaluate_models(config, tmp_path / "out", lambda stage, *_: stages.append(stage)) == results
    assert not [stage for stage in stages if stage.startswith("testing")]


def test_the_folder_of_another_evaluation_is_refused(comparison, tmp_path):
    config = EvaluationConfig(models=(str(comparison / "alibi"),), evaluate=EVALUATE)
    evaluate_models(config, tmp_path / "out", silent)
    other = replace(config, evaluate=replace(EVALUATE, strides=(2,)))
    with pytest.raises(ValueError, match="holds a run with another strides: give a new folder"):
        evaluate_models(other, tmp_path / "out", silent)


def test_models_on_different_texts_are_not_put_in_one_table(comparison, elsewhere):
    config = EvaluationConfig(models=(str(comparison / "alibi"), str(elsewhere)), evaluate=EVALUATE)
    with pytest.raises(ValueError, match=r"^MODELS: .*tiny-llama was not trained on the text of the first one"):
        evaluate_models(config, None, silent)


def test_models_that_a_table_cannot_tell_apart_are_refused(comparison, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in (comparison / "alibi").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    config = EvaluationConfig(models=(str(comparison / "alibi"), str(copy)), evaluate=EVALUATE)
    with pytest.raises(ValueError, match=r"alibi and .*copy are both alibi trained at 16, which a table cannot tell"):
        evaluate_models(config, None, silent)


def test_retrieval_needs_no_text(comparison, monkeypatch):
    monkeypatch.setattr("longreach.evaluation.prepare", lambda *_: pytest.fail("text was read"))
    asked = EvaluateConfig(tasks=("retrieval",), valid_lengths=(64,), cases_per_depth=1, num_depths=2)
    results = evaluate_models(EvaluationConfig(models=(str(comparison / "alibi"),), evaluate=asked), None, silent)
    assert [record.depth for record in results.retrieval] == [0.0, 1.0]
    assert results.provenance.corpus == "none"


def test_a_bad_file_of_cases_is_named_with_its_line(comparison, tmp_path):
    (tmp_path / "cases.jsonl").write_text('{"prompt": "a 1 b", "answer": "1"}\n{"prompt": "a"}\n')
    asked = EvaluateConfig(tasks=("passkey",), cases=str(tmp_path / "cases.jsonl"), valid_lengths=(64,))
    with pytest.raises(ValueError, match=r"cases\.jsonl.*2.*has no field 'answer'"):
        evaluate_models(EvaluationConfig(models=(str(comparison / "alibi"),), evaluate=asked), tmp_path / "out", silent)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("models", "message"), [((), "MODELS is empty"), (("a", "a"), "MODELS=a a: give each")])
def test_models_that_make_no_evaluation(models, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        EvaluationConfig(models=models)


@pytest.fixture(scope="module")
def bloom(comparison, tmp_path_factory):
    """A folder that transformers saved a BLOOM to."""
    folder = tmp_path_factory.mktemp("models") / "tiny-bloom"
    tokenizer = load_tokenizer(comparison / "alibi" / "tokenizer.json")
    torch.manual_seed(0)
    config = transformers.BloomConfig(vocab_size=tokenizer.vocab_size, hidden_size=16, n_layer=2, n_head=2)
    model = transformers.BloomForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.5)
    model.save_pretrained(folder)
    tokenizer.save(folder / "tokenizer.json")
    return str(folder)


def test_scalings_stand_side_by_side(bloom, corpus, tmp_path):
    scalings = ("stock", "none", "linear", "ntk", "linear-fixed=2", "none+logn")
    asked = replace(
        EVALUATE, tasks=("perplexity", "retrieval"), valid_lengths=(16, 64), cases_per_depth=1, num_depths=1
    )
    config = EvaluationConfig(models=(bloom,), evaluate=asked, data=str(corpus), train_length=16, scalings=scalings)
    results = evaluate_models(config, tmp_path / "out", silent)
    assert results.methods() == tuple(f"{bloom}:{scaling}" for scaling in scalings)
    nll = {
        (scaling, length): results.find(f"{bloom}:{scaling}", 16, length).nll
        for scaling in scalings
        for length in (16, 64)
    }
    assert nll["none", 64] == pytest.approx(nll["stock", 64], rel=1e-5)  # BLOOM's own code is right in float32
    for scaling in ("linear", "ntk", "none+logn"):
        assert nll[scaling, 16] == pytest.approx(nll["none", 16], rel=1e-6)
        assert abs(nll[scaling, 64] / nll["none", 64] - 1) > 1e-5
    assert abs(nll["linear-fixed=2", 16] / nll["none", 16] - 1) > 1e-5
    assert {record.method for record in results.retrieval} == set(results.methods())


@pytest.mark.parametrize("scaling", ["cubic", "linear=2", "linear-fixed", "linear-fixed=two", "ntk+log", "stock+logn"])
def test_scalings_that_there_are_not(scaling):
    with pytest.raises(ValueError, match=r"^scalings="):
        EvaluationConfig(models=("a",), scalings=(scaling,))


def test_runs_of_our_own_are_not_scaled(comparison):
    config = EvaluationConfig(models=(str(comparison / "alibi"),), evaluate=EVALUATE, scalings=("linear",))
    with pytest.raises(ValueError, match=r"^scalings=linear: .* was trained by longreach; fine-tune it with --from"):
        evaluate_models(config, None, silent)
