import pytest
import torch
import transformers

from longreach.cli import main
from longreach.data.tokenizer import train_tokenizer
from longreach.results import Results


@pytest.mark.usefixtures("unrendered")
def test_without_a_scaling_a_model_is_measured_as_it_is_and_under_two(corpus, tmp_path):
    tokenizer = train_tokenizer([path.read_text() for path in sorted(corpus.iterdir())], 300)
    torch.manual_seed(0)
    config = transformers.BloomConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=16, n_layer=1, n_head=2, seq_length=16, initializer_range=0.5
    )
    folder = tmp_path / "model"
    transformers.BloomForCausalLM(config).save_pretrained(folder)
    tokenizer.save(folder / "tokenizer.json")
    asked = ["--data", str(corpus), "--task", "perplexity", "--lengths", "16,32", "--valid-tokens", "64"]
    main(["extend", str(folder), *asked, "--output", str(tmp_path / "out")])
    results = Results.read(tmp_path / "out" / "results.json")
    assert results.methods() == (f"{folder}:none", f"{folder}:linear", f"{folder}:ntk")
    nats = {length: {e.nll for e in results.records if e.valid_length == length} for length in (16, 32)}
    assert {length: len(values) for length, values in nats.items()} == {16: 1, 32: 3}  # up to L none changes a thing
