import shutil
from dataclasses import replace

import pytest
import torch

from longreach.data.prepare import DataConfig
from longreach.measure.plan import EvaluateConfig
from longreach.models.config import Architecture
from longreach.models.files import load_model
from longreach.results import Results
from longreach.train.config import TrainConfig
from longreach.verbs.compare import CompareConfig, compare
from longreach.verbs.export import ExportConfig, export


@pytest.fixture(scope="module")
def comparison(corpus, tmp_path_factory):
    """The folder of a finished comparison."""
    folder = tmp_path_factory.mktemp("comparison")
    config = CompareConfig(
        methods=("alibi", "rotary"),
        data=DataConfig(data=str(corpus), vocab_size=300, valid_fraction=0.2, cache=str(folder / "cache")),
        model=Architecture(num_layers=1, num_heads=2, d_model=16),
        train=TrainConfig(train_length=16, steps=4, batch_size=4, warmup_steps=2, device="cpu"),
        evaluate=EvaluateConfig(valid_lengths=(16, 32), valid_tokens=256),
    )
    compare(config, folder / "out", lambda stage, done, total, note="": None)
    return folder / "out"


def test_transformers_loads_it_and_its_card_has_its_perplexities(comparison, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export(ExportConfig(comparison / "alibi", tmp_path / "mpt", max_length=64))
    ours, theirs = load_model(comparison / "alibi"), AutoModelForCausalLM.from_pretrained(tmp_path / "mpt").eval()
    tokens = torch.tensor([AutoTokenizer.from_pretrained(tmp_path / "mpt")("document 3 line 4: the sum")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, ours(tokens), rtol=0, atol=1e-5)
    assert theirs.config.max_seq_len == 64
    record = next(r for r in Results.read(comparison / "results.json").records if r.method == "alibi")
    card = (tmp_path / "mpt" / "README.md").read_text(encoding="utf-8")
    assert f"{record.perplexity:.2f}" in card
    assert "rotary" not in card


def test_no_perplexities_of_another_run(comparison, tmp_path):
    moved = shutil.copytree(comparison / "alibi", tmp_path / "moved" / "alibi")
    export(ExportConfig(moved, tmp_path / "alone"))
    assert "| alibi |" not in (tmp_path / "alone" / "README.md").read_text(encoding="utf-8")
    training = (moved / "training.json").read_text()
    (moved / "training.json").write_text(training.replace('"steps": 4', '"steps": 5'))
    shutil.copy(comparison / "results.json", tmp_path / "moved")
    export(ExportConfig(moved, tmp_path / "beside"))  # beside results of a comparison that it is none of
    assert "| alibi |" not in (tmp_path / "beside" / "README.md").read_text(encoding="utf-8")
    export(ExportConfig(moved, tmp_path / "given", results=comparison / "results.json"))
    assert "| alibi |" in (tmp_path / "given" / "README.md").read_text(encoding="utf-8")


def test_a_run_of_several_shapes_has_its_own_perplexities(comparison, tmp_path):
    results = Results.read(comparison / "results.json")
    shaped = [replace(model, shape=shape) for model in results.models() for shape in ("1x16", "2x16")]
    (training,) = (entry for entry in results.training if entry.method == "alibi")
    (record,) = (entry for entry in results.records if (entry.method, entry.valid_length) == ("alibi", 32))
    small, large = shaped[:2]
    together = replace(
        results,
        training=(replace(training, model=large, parameters=1), replace(training, model=small)),
        records=(replace(record, model=large, nll=2 * record.nll), replace(record, model=small)),
        contexts=(),
        decompositions=(),
    )
    run = shutil.copytree(comparison / "alibi", tmp_path / "shapes" / "alibi-1x16")
    together.write(tmp_path / "shapes" / "results.json")
    export(ExportConfig(run, tmp_path / "mpt"))
    card = (tmp_path / "mpt" / "README.md").read_text(encoding="utf-8")
    assert f"| alibi:1x16 | {record.perplexity:.2f} |" in card


def test_results_without_the_run_are_refused(comparison, tmp_path):
    results = Results.read(comparison / "results.json")
    others = tuple(entry for entry in results.records if entry.method != "alibi")
    replace(results, records=others).write(tmp_path / "results.json")
    with pytest.raises(ValueError, match=r"^results=.*results\.json: it has no perplexities of alibi trained at 16"):
        export(ExportConfig(comparison / "alibi", tmp_path / "mpt", results=tmp_path / "results.json"))


def test_what_mpt_cannot_hold_leaves_nothing(comparison, tmp_path):
    with pytest.raises(ValueError, match="rotary"):
        export(ExportConfig(comparison / "rotary", tmp_path / "mpt"))
    assert list(tmp_path.iterdir()) == []
