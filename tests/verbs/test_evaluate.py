import hashlib
import json
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers

from longreach.data.prepare import DataConfig
from longreach.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from longreach.measure.plan import EvaluateConfig
from longreach.models.config import Architecture
from longreach.models.decoder import Decoder
from longreach.reading import read_file
from longreach.results import Model, Results
from longreach.results.merge import merge
from longreach.train.config import RunConfig, TrainConfig
from longreach.verbs import evaluate as verb
from longreach.verbs.compare import CompareConfig, compare
from longreach.verbs.evaluate import EvaluationConfig, evaluate_models
from longreach.verbs.train import open_run, train_run

EVALUATE = EvaluateConfig(valid_lengths=(16, 32), valid_tokens=256)

pytestmark = pytest.mark.usefixtures("unrendered")


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
def seeds(comparison, tmp_path_factory):
    """Folders of two runs that differ in their seed, and so in the split of their text."""
    folder = tmp_path_factory.mktemp("seeds")
    config = read_file(RunConfig, comparison / "none" / "config.toml")
    data = replace(config.data, tokenizer=str(comparison / "none" / "tokenizer.json"), split_seed=None)
    for seed in (0, 1):
        run = replace(config, data=data, train=replace(config.train, seed=seed))
        train_run(run, folder / str(seed), silent)
    return str(folder / "0"), str(folder / "1")


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


@pytest.mark.parametrize("given", [True, False])
def test_only_what_is_scored_is_tokenized_and_once_for_all_runs(comparison, corpus, tmp_path, monkeypatch, given):
    tokenized = []
    encode = Tokenizer.encode_batch
    monkeypatch.setattr(
        Tokenizer, "encode_batch", lambda tokenizer, texts: tokenized.extend(texts) or encode(tokenizer, texts)
    )
    monkeypatch.setattr(DataConfig, "cache_folder", lambda config: tmp_path / "cache")  # the tokens are not there
    config = EvaluationConfig(
        models=(str(comparison / "alibi"), str(comparison / "none")),
        evaluate=replace(EVALUATE, valid_tokens=64),
        data=str(corpus) if given else None,
    )
    evaluate_models(config, None, silent)
    texts = [path.read_text() for path in sorted(corpus.iterdir())]
    assert tokenized == texts[:1] if given else len(tokenized) == 1 and tokenized[0] in texts


def test_the_text_may_stand_in_another_field_and_bad_lines_are_left_out(comparison, corpus, tmp_path):
    texts = [path.read_text() for path in sorted(corpus.rglob("*")) if path.is_file()]
    path = tmp_path / "text.jsonl"
    path.write_text("{\n" + "\n".join(json.dumps({"body": text}) for text in texts))
    config = EvaluationConfig((str(comparison / "none"),), EVALUATE, data=str(path), text_field="body")
    with pytest.raises(ValueError, match=r"^data: .*:1 is not JSON .* \(--skip-bad\)$"):
        evaluate_models(config, None, silent)
    results = evaluate_models(replace(config, skip_bad=True), None, silent)
    assert results.provenance.corpus == f"{path}, without 1 bad file or line: {path}:1"
    for option in ({"text_field": "body"}, {"skip_bad": True}):
        with pytest.raises(ValueError, match=r"^(text_field=body|skip_bad=True): it is for data; give that too"):
            EvaluationConfig(config.models, EVALUATE, **option)


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
    with pytest.raises(ValueError, match="was begun with strides=none; give a new folder"):
        evaluate_models(other, tmp_path / "out", silent)


def test_models_on_different_texts_are_not_put_in_one_table(comparison, elsewhere):
    config = EvaluationConfig(models=(str(comparison / "alibi"), str(elsewhere)), evaluate=EVALUATE)
    with pytest.raises(ValueError, match=r"^models: .*tiny-llama has not the validation text of the first one"):
        evaluate_models(config, None, silent)


def test_runs_of_two_seeds_are_evaluated_together_on_a_given_text(seeds, corpus):
    evaluated = EvaluationConfig(models=seeds, evaluate=EVALUATE, data=str(corpus))
    results = evaluate_models(evaluated, None, silent)
    assert results.models() == tuple(Model("none", 16, seed=seed) for seed in (0, 1))
    assert [(r.seed, r.valid_length) for r in results.records] == [(0, 16), (0, 32), (1, 16), (1, 32)]
    assert len({record.bytes for record in results.records}) == 1
    assert len({record.nll for record in results.records if record.valid_length == 32}) == 2


def test_runs_of_two_splits_are_not_evaluated_together_on_what_each_held_out(seeds):
    with pytest.raises(ValueError, match=r"^models: .*1 has not the validation text of the first one: give the text"):
        evaluate_models(EvaluationConfig(models=seeds, evaluate=EVALUATE), None, silent)


def test_seeds_that_decide_on_no_split_part_no_runs(comparison, corpus, tmp_path, monkeypatch):
    tokenizer = str(comparison / "none" / "tokenizer.json")
    before = read_file(RunConfig, comparison / "none" / "config.toml")
    data = replace(before.data, tokenizer=tokenizer, valid_data=str(corpus))
    runs = [str(tmp_path / str(seed)) for seed in (0, 1)]
    for seed, run in enumerate(runs):
        config = replace(before, data=replace(data, split_seed=5 + seed), train=replace(before.train, seed=seed))
        train_run(config, Path(run), silent)
    read = []
    prepare_validation = verb.prepare_validation
    monkeypatch.setattr(verb, "prepare_validation", lambda *a: read.append(a) or prepare_validation(*a))
    alone = [evaluate_models(EvaluationConfig((run,), EVALUATE), None, silent) for run in runs]
    assert alone[0].provenance.corpus_hash == alone[1].provenance.corpus_hash
    read.clear()
    together = evaluate_models(EvaluationConfig(tuple(runs), EVALUATE), None, silent)
    assert len(read) == 1
    assert together.provenance.split_seed is None
    merged = merge(dict(zip(runs, alone, strict=True)))
    assert sorted(map(str, numbers(merged))) == sorted(map(str, numbers(together)))


def test_models_that_a_table_cannot_tell_apart_are_refused(comparison, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in (comparison / "alibi").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    config = EvaluationConfig(models=(str(comparison / "alibi"), str(copy)), evaluate=EVALUATE)
    with pytest.raises(ValueError, match=r"alibi and .*copy are both alibi trained at 16, seed 0, which a table"):
        evaluate_models(config, None, silent)


def test_retrieval_needs_no_text(comparison, monkeypatch):
    monkeypatch.setattr("longreach.verbs.evaluate.prepare_validation", lambda *_: pytest.fail("text was read"))
    asked = EvaluateConfig(tasks=("retrieval",), valid_lengths=(64,), cases_per_depth=1, num_depths=2)
    results = evaluate_models(EvaluationConfig(models=(str(comparison / "alibi"),), evaluate=asked), None, silent)
    assert [record.depth for record in results.retrieval] == [0.0, 1.0]
    assert results.provenance.corpus == "none"


@pytest.fixture(scope="module")
def longer(comparison, tmp_path_factory):
    """A folder with a run of one method at twice the training length, on the same text."""
    folder = tmp_path_factory.mktemp("longer") / "out"
    config = read_file(CompareConfig, comparison / "config.toml")
    config = replace(config, methods=("alibi",), train=replace(config.train, train_length=32, batch_size=2))
    compare(config, folder, silent)
    return folder / "alibi"


def test_models_of_several_training_lengths_are_scored_on_one_text(comparison, longer):
    # The longest windows, of 16 and of 32 times L, are longer than valid_tokens.
    asked = EvaluateConfig(tasks=("perplexity",), valid_tokens=64)
    models = (str(comparison / "alibi"), str(longer))
    results = evaluate_models(EvaluationConfig(models=models, evaluate=asked), None, silent)
    assert {record.train_length for record in results.records} == {16, 32}
    assert {(record.tokens, record.bytes) for record in results.records} == {
        (16 * 32, results.records[0].bytes),
    }


def test_a_text_too_short_for_a_later_model_is_refused_before_the_first_is_loaded(
    comparison, longer, corpus, tmp_path, monkeypatch
):
    tokenizer = load_tokenizer(longer / "tokenizer.json")
    text = next(file for file in corpus.iterdir()).read_text()
    (tmp_path / "short.txt").write_text(tokenizer.decode(tokenizer.encode(text)[:400]))
    config = EvaluationConfig(models=(str(comparison / "alibi"), str(longer)), data=str(tmp_path / "short.txt"))
    evaluate_models(replace(config, models=config.models[:1]), None, silent)
    monkeypatch.setattr("longreach.verbs.evaluate.open_run", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=r"^valid_lengths=512: the validation text has \d+ tokens"):
        evaluate_models(config, tmp_path / "out", silent)
    assert not (tmp_path / "out").exists()


def copy_of(run, folder):
    shutil.copytree(run, folder)
    return folder


def test_runs_bring_the_cost_of_their_training(comparison):
    models = (str(comparison / "alibi"), str(comparison / "none"))
    results = evaluate_models(EvaluationConfig(models=models, evaluate=EVALUATE), None, silent)
    assert results.training == Results.read(comparison / "results.json").training


def test_what_was_measured_before_a_model_failed_is_told_and_reported(comparison, tmp_path):
    broken = copy_of(comparison / "none", tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"damaged")
    config = EvaluationConfig(models=(str(comparison / "alibi"), str(broken)), evaluate=EVALUATE)
    told = []
    with pytest.raises(ValueError, match=r"broken/model.safetensors: damaged or not a longreach model"):
        evaluate_models(config, tmp_path / "out", silent, told.append)
    assert told[-1] == Results.read(tmp_path / "out" / "results.json")
    assert {entry.method for entry in told[-1].entries()} == {"alibi"}
    assert (tmp_path / "out" / "report.html").exists()


def test_a_tokenizer_of_another_run_is_refused(comparison, tmp_path):
    run = copy_of(comparison / "alibi", tmp_path / "run")
    train_tokenizer(["one two"], 280).save(run / "tokenizer.json")
    size = load_tokenizer(run / "tokenizer.json").vocab_size
    config = EvaluationConfig(models=(str(run),), evaluate=EVALUATE)
    with pytest.raises(ValueError, match=rf"run has a model of 300 tokens and a tokenizer\.json of {size}: put the"):
        evaluate_models(config, None, silent)


def test_a_tokenizer_of_the_same_size_that_is_another_is_refused(comparison, tmp_path):
    run = copy_of(comparison / "alibi", tmp_path / "run")
    tokenizer = json.loads((run / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (run / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    config = EvaluationConfig(models=(str(run),), evaluate=EVALUATE)
    with pytest.raises(ValueError, match=r"run has another tokenizer\.json than its model was trained with: put that"):
        evaluate_models(config, None, silent)


def test_models_that_changed_since_are_not_taken_for_those_that_were_measured(comparison, elsewhere, corpus, tmp_path):
    run, model = copy_of(comparison / "alibi", tmp_path / "run"), copy_of(elsewhere, tmp_path / "model")
    config = EvaluationConfig(models=(str(run), str(model)), evaluate=EVALUATE, data=str(corpus))
    results = evaluate_models(config, tmp_path / "out", silent)
    assert set(results.provenance.sources) == {f"weights of {run}", f"weights of {model}"}
    assert numbers(evaluate_models(config, tmp_path / "out", silent)) == numbers(results)
    for folder, other in ((model, "config.json"), (run, "model.safetensors")):
        before = (folder / other).read_bytes()
        (folder / other).write_bytes(before + b" ")
        with pytest.raises(
            ValueError,
            match=rf"out: it was begun with another weights of {re.escape(str(folder))}; give a new folder, or what",
        ):
            evaluate_models(config, tmp_path / "out", silent)
        (folder / other).write_bytes(before)


def test_cases_that_changed_since_are_refused(comparison, tmp_path):
    cases = tmp_path / "cases.jsonl"
    cases.write_text('{"prompt": "a 1 b", "answer": "1"}\n')
    asked = EvaluateConfig(tasks=("passkey",), cases=str(cases), valid_lengths=(64,))
    config = EvaluationConfig(models=(str(comparison / "alibi"),), evaluate=asked)
    results = evaluate_models(config, tmp_path / "out", silent)
    assert results.provenance.sources[f"cases {cases}"] == hashlib.sha256(cases.read_bytes()).hexdigest()
    cases.write_text('{"prompt": "a 2 b", "answer": "2"}\n')
    with pytest.raises(
        ValueError,
        match=r"out: it was begun with another cases .*cases\.jsonl; give .*, or what was read then$",
    ):
        evaluate_models(config, tmp_path / "out", silent)


@pytest.mark.parametrize(("argument", "task"), [("cases", "passkey"), ("meetings", "qmsum")])
def test_a_missing_file_of_cases_is_named_with_its_argument(comparison, tmp_path, argument, task):
    asked = EvaluateConfig(tasks=(task,), valid_lengths=(64,), **{argument: str(tmp_path / "none.jsonl")})
    with pytest.raises(FileNotFoundError, match=rf"^{argument}=.*none\.jsonl: no such file; give a \.jsonl file"):
        evaluate_models(EvaluationConfig(models=(str(comparison / "alibi"),), evaluate=asked), None, silent)


def test_a_bad_file_of_cases_is_named_with_its_line(comparison, tmp_path):
    (tmp_path / "cases.jsonl").write_text('{"prompt": "a 1 b", "answer": "1"}\n{"prompt": "a"}\n')
    asked = EvaluateConfig(tasks=("passkey",), cases=str(tmp_path / "cases.jsonl"), valid_lengths=(64,))
    with pytest.raises(ValueError, match=r"cases\.jsonl.*2.*has no field 'answer'"):
        evaluate_models(EvaluationConfig(models=(str(comparison / "alibi"),), evaluate=asked), tmp_path / "out", silent)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("models", "message"), [((), "models is empty"), (("a", "a"), "models=a,a: give each")])
def test_models_that_make_no_evaluation(models, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        EvaluationConfig(models=models)


@pytest.mark.parametrize(
    "given",
    [
        {"dtype": "float32"},
        {"dtype": "bfloat16"},
        {"trust_remote_code": True},
        {"train_length": 8},
        {"scalings": ("stock",)},
    ],
    ids=str,
)
def test_what_a_run_would_not_heed_is_refused(comparison, given):
    (name,) = given
    with pytest.raises(ValueError, match=f"^{name}=.*(leave it out|give none)$"):
        evaluate_models(EvaluationConfig(models=(str(comparison / "alibi"),), **given), None, silent)


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
    nll = {(record.method.removeprefix(f"{bloom}:"), record.valid_length): record.nll for record in results.records}
    assert nll["none", 64] == pytest.approx(nll["stock", 64], rel=1e-5)  # BLOOM's own code is right in float32
    for scaling in ("linear", "ntk", "none+logn"):
        assert nll[scaling, 16] == pytest.approx(nll["none", 16], rel=1e-6)
        assert abs(nll[scaling, 64] / nll["none", 64] - 1) > 1e-5
    assert abs(nll["linear-fixed=2", 16] / nll["none", 16] - 1) > 1e-5
    assert {record.method for record in results.retrieval} == set(results.methods())


def test_without_a_scaling_of_its_own_it_is_the_configuration_s(bloom, corpus, tmp_path):
    model = transformers.BloomForCausalLM.from_pretrained(bloom)
    model.config.alibi_scaling = {"type": "linear", "factor": 2.0}
    model.save_pretrained(tmp_path)
    load_tokenizer(bloom).save(tmp_path / "tokenizer.json")

    def nll(folder, *scalings):
        config = EvaluationConfig(
            models=(str(folder),), evaluate=EVALUATE, data=str(corpus), train_length=16, scalings=scalings
        )
        return [record.nll for record in evaluate_models(config, None, silent).records]

    assert nll(tmp_path, "none", "linear") == nll(bloom, "linear-fixed=2", "linear")
    assert nll(tmp_path) == nll(bloom, "linear-fixed=2")
    assert nll(tmp_path, "none+logn") == nll(bloom, "linear-fixed=2+logn")


@pytest.mark.parametrize("scaling", ["cubic", "linear=2", "linear-fixed", "linear-fixed=two", "ntk+log", "stock+logn"])
def test_scalings_that_there_are_not(scaling):
    with pytest.raises(ValueError, match=r"^scalings=.*; or stock$"):
        EvaluationConfig(models=("a",), scalings=(scaling,))


@pytest.fixture(scope="module")
def rotary(comparison, tmp_path_factory):
    """The folder of a run of rotary positions on the text of the comparison."""
    config = read_file(RunConfig, comparison / "none" / "config.toml")
    data = replace(config.data, tokenizer=str(comparison / "none" / "tokenizer.json"))
    folder = tmp_path_factory.mktemp("rotary") / "run"
    train_run(replace(config, method="rotary", data=data), folder, silent)
    return folder


@pytest.mark.parametrize(
    ("method", "scalings"),
    [
        ("alibi", ("none", "linear", "ntk", "linear-fixed=2", "none+logn")),
        ("rotary", ("none", "linear", "ntk", "yarn", "linear-fixed=2", "yarn-fixed=2")),
    ],
)
def test_runs_are_scaled_at_test_time_without_training_again(comparison, rotary, tmp_path, method, scalings):
    run = comparison / "alibi" if method == "alibi" else rotary
    asked = replace(EVALUATE, valid_lengths=(16, 64), protocols=("nonoverlapping", "cached"))
    config = EvaluationConfig(models=(str(run),), evaluate=asked, scalings=scalings)
    results = evaluate_models(config, tmp_path / "out", silent)
    names = (method, *(f"{method}:{scaling}" for scaling in scalings[1:]))
    assert results.methods() == names
    assert {entry.model for entry in results.entries()} == {Model(name, 16, 0) for name in names}
    assert [entry.method for entry in results.training] == [method]  # which was trained once
    nll = {(entry.method, entry.valid_length, entry.protocol): entry.nll for entry in results.records}
    for name in names[1:]:
        assert nll[name, 64, "nonoverlapping"] != nll[method, 64, "nonoverlapping"]
        assert nll[name, 64, "cached"] != nll[method, 64, "cached"]  # a cache is told the length of its window
        assert (nll[name, 16, "nonoverlapping"] == nll[method, 16, "nonoverlapping"]) == ("fixed" not in name)
    report = (tmp_path / "out" / "report.html").read_text()
    assert all(name in report for name in names)


def test_a_run_under_a_scaling_is_the_method_that_has_it(comparison):
    run = comparison / "alibi"
    plain, scaled = open_run(run).model, open_run(run, method="alibi:scaling=linear").model
    itself = Decoder(replace(plain.config, method="alibi:scaling=linear")).eval()
    itself.load_state_dict(plain.state_dict())
    tokens = torch.arange(40)[None]
    with torch.inference_mode():
        assert torch.equal(scaled(tokens), itself(tokens))
        assert not torch.equal(scaled(tokens), plain(tokens))


@pytest.mark.parametrize(
    ("method", "scaling", "message"),
    [
        ("none", "linear", "scalings='linear': position method none has no scaling; give none, or a model of alibi or"),
        ("alibi", "yarn", 'scalings="yarn" scales the frequencies of rotary positions, and ALiBi has slopes: give'),
    ],
)
def test_runs_refuse_scalings_that_their_method_does_not_have(comparison, method, scaling, message):
    config = EvaluationConfig(models=(str(comparison / method),), evaluate=EVALUATE, scalings=(scaling,))
    with pytest.raises(ValueError, match=f"^{message}.*{method}"):
        evaluate_models(config, None, silent)


def test_runs_have_no_stock_code(comparison):
    config = EvaluationConfig(models=(str(comparison / "alibi"),), evaluate=EVALUATE, scalings=("stock",))
    with pytest.raises(ValueError, match=r"^scalings=stock: .* was trained by longreach and has no other code"):
        evaluate_models(config, None, silent)


def test_pretrained_alibi_has_no_frequencies_to_scale(bloom, corpus):
    config = EvaluationConfig(
        models=(bloom,), evaluate=EVALUATE, data=str(corpus), train_length=16, scalings=("yarn-fixed=2",)
    )
    with pytest.raises(
        ValueError, match=r'^scalings="yarn-fixed=2" scales the frequencies of rotary positions, and .*bloom'
    ):
        evaluate_models(config, None, silent)


def test_pretrained_rotary_positions_are_scaled_in_the_stock_code(elsewhere, corpus, tmp_path):
    model = transformers.LlamaForCausalLM.from_pretrained(elsewhere)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.5)
    model.save_pretrained(copy_of(elsewhere, tmp_path / "loud"))
    name = str(tmp_path / "loud")
    scalings = ("none", "linear", "ntk", "yarn", "linear-fixed=2")
    asked = replace(EVALUATE, valid_lengths=(16, 64), protocols=("nonoverlapping", "cached"))
    config = EvaluationConfig(models=(name,), evaluate=asked, data=str(corpus), scalings=scalings)
    results = evaluate_models(config, tmp_path / "out", silent)
    assert results.methods() == tuple(f"{name}:{scaling}" for scaling in scalings)
    assert {entry.attention for entry in results.records} == {"transformers sdpa"}
    nll = {
        (entry.method.removeprefix(f"{name}:"), entry.valid_length, entry.protocol): entry.nll
        for entry in results.records
    }
    for scaling in scalings[1:]:
        unchanged = nll["none", 16, "nonoverlapping"]
        assert (nll[scaling, 16, "nonoverlapping"] == pytest.approx(unchanged, rel=1e-6)) == ("fixed" not in scaling)
        for protocol in asked.protocols:
            assert nll[scaling, 64, protocol] != pytest.approx(nll["none", 64, protocol], rel=1e-4)


@pytest.mark.parametrize(
    ("configuration", "told"),
    [
        (
            partial(
                transformers.LlamaConfig,
                rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
            ),
            "this llama has a scaling of its own already, rope_type=linear: give none",
        ),
        (transformers.GPT2Config, "gpt2 has neither ALiBi nor rotary positions, as far as longreach knows: give stock"),
        (transformers.OPTConfig, "opt has neither ALiBi nor rotary positions, .*: give stock"),
    ],
)
def test_what_cannot_be_scaled_is_told_before_a_model_is_loaded(elsewhere, corpus, tmp_path, configuration, told):
    folder = copy_of(elsewhere, tmp_path / "other")
    configuration().save_pretrained(folder)
    models = (str(elsewhere), str(folder))
    config = EvaluationConfig(models=models, evaluate=EVALUATE, data=str(corpus), scalings=("linear",))
    with pytest.raises(ValueError, match=rf'^scalings="linear": {told} \(.*other\)$'):
        evaluate_models(config, tmp_path / "out", silent)
    assert not (tmp_path / "out").exists()
