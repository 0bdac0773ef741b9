"""Measure the recipes of docs/finetuning.md on a small model and fill its tables.

python docs/finetuning.py TEXT FOLDER llama
python docs/finetuning.py TEXT FOLDER gpt2

TEXT is a file of plain text of which the first 10 MB are used; FOLDER gets the models, and is gone on with when the
script is run again. Each takes about ten minutes of one core.
"""

import math
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import nn

from longreach.cli import main as longreach
from longreach.data.batches import Batches
from longreach.data.prepare import DataConfig, PreparedData, prepare
from longreach.data.sequences import Blocks
from longreach.data.tokenizer import Tokenizer
from longreach.measure.plan import EvaluateConfig
from longreach.pretrained.convert import convert
from longreach.pretrained.extend import extend
from longreach.pretrained.load import load_pretrained
from longreach.pretrained.save import save_pretrained
from longreach.train.config import TrainConfig
from longreach.train.loop import Trainee, train
from longreach.verbs.evaluate import EvaluationConfig, evaluate_models
from longreach.verbs.start import next_token_loss

PAGE = Path(__file__).with_suffix(".md")
LENGTH, BATCH_TOKENS = 64, 1024
PRETRAINING, FINE_TUNING = 1200, 120
LENGTHS = (LENGTH, 2 * LENGTH, 4 * LENGTH, 8 * LENGTH)
TEXT_BYTES, VALID_BYTES, VALID_TOKENS = 10_000_000, 500_000, 40_000


def split(text: Path, folder: Path) -> tuple[Path, Path]:
    """Training and validation text, the latter from the end."""
    content = text.read_bytes()[:TEXT_BYTES].decode(errors="ignore")
    paths = folder / "train.txt", folder / "valid.txt"
    folder.mkdir(parents=True, exist_ok=True)
    for path, part in zip(paths, (content[:-VALID_BYTES], content[-VALID_BYTES:]), strict=True):
        path.write_text(part, encoding="utf-8")
    return paths


def gpt2(tokenizer: Tokenizer) -> transformers.PreTrainedConfig:
    size = {"n_embd": 128, "n_layer": 3, "n_head": 4, "n_positions": LENGTH, "vocab_size": tokenizer.vocab_size}
    dropout = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    return transformers.GPT2Config(**size, **dropout, bos_token_id=tokenizer.eos_id, eos_token_id=tokenizer.eos_id)


def llama(tokenizer: Tokenizer) -> transformers.PreTrainedConfig:
    size = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3, "num_attention_heads": 4}
    special = {"bos_token_id": tokenizer.eos_id, "eos_token_id": tokenizer.eos_id, "tie_word_embeddings": True}
    return transformers.LlamaConfig(max_position_embeddings=LENGTH, vocab_size=tokenizer.vocab_size, **size, **special)


SHAPES: dict[str, Callable[[Tokenizer], transformers.PreTrainedConfig]] = {"gpt2": gpt2, "llama": llama}
POSITIONS = {"gpt2": "learned positions", "llama": "rotary positions"}


def pretrain(
    shape: Callable[[Tokenizer], transformers.PreTrainedConfig],
    folder: Path,
    prepared: PreparedData,
    steps: int,
    *,
    start: Path | None = None,
    alibi: bool,
) -> Path:
    """Train a model into a folder as transformers has it, or with ALiBi from the start."""

    def build(device: torch.device) -> Trainee:
        if start is None:
            model = transformers.AutoModelForCausalLM.from_config(shape(prepared.tokenizer))
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(start)
        write = model.save_pretrained
        if alibi:
            write = partial(save_pretrained, convert(model))

        def save(folder: Path, weights: dict[str, torch.Tensor]) -> None:
            write(folder, state_dict=weights)

        return Trainee("alibi" if alibi else "stock", model.train(), next_token_loss(model), "auto", save)

    folder.mkdir(parents=True, exist_ok=True)
    prepared.tokenizer.save(folder / "tokenizer.json")
    rate = {"learning_rate": 2e-3} if start is None else {"learning_rate": 1e-3, "warmup_steps": 10}
    config = TrainConfig(train_length=LENGTH, steps=steps, batch_size=BATCH_TOKENS // LENGTH, device="cpu", **rate)
    train(build, config, Batches(Blocks(prepared.train, LENGTH), config.batch_size, 0 if start is None else 1), folder)
    return folder


def save(model: nn.Module, folder: Path, prepared: PreparedData) -> Path:
    save_pretrained(model, folder)
    prepared.tokenizer.save(folder / "tokenizer.json")
    return folder


def fine_tune(
    start: Path,
    folder: Path,
    texts: tuple[Path, Path],
    *,
    length: int = LENGTH,
    method: str = "alibi",
    steps: int = FINE_TUNING,
) -> Path:
    """What the page shows as a command."""
    words = ["train", "--from", str(start), "--output", str(folder), "--method", method, "--train-length", str(length)]
    words += ["--data", str(texts[0]), "--valid-data", str(texts[1]), "--steps", str(steps), "--seed", "1"]
    words += ["--batch-size", str(BATCH_TOKENS // length), "--learning-rate", "1e-3", "--warmup-steps", "10"]
    longreach([*words, "--device", "cpu"])
    return folder


def row(label: str, model: Path, text: Path) -> str:
    """Perplexity at each length, nonoverlapping windows."""
    evaluate = EvaluateConfig(valid_lengths=LENGTHS, valid_tokens=VALID_TOKENS)
    config = EvaluationConfig(
        models=(str(model),), evaluate=evaluate, data=str(text), device="cpu", train_length=LENGTH
    )
    records = evaluate_models(config, None, lambda *_: None).records
    measured = {record.valid_length: f"{math.exp(record.nll / record.tokens):.1f}" for record in records}
    return " | ".join([f"| {label}", *(measured.get(length, "-") for length in LENGTHS)]) + " |"


def fill(mark: str, rows: Sequence[str]) -> None:
    """Put a table between the marks of the page."""
    head = ["| perplexity at | " + " | ".join(f"{length} tokens" for length in LENGTHS) + " |"]
    table = "\n".join([*head, "|---" * (1 + len(LENGTHS)) + "|", *rows])
    page = PAGE.read_text(encoding="utf-8")
    pattern = rf"(<!-- {mark} -->\n).*?(<!-- end of {mark} -->)"
    PAGE.write_text(re.sub(pattern, lambda found: f"{found[1]}{table}\n{found[2]}", page, flags=re.DOTALL))
    print(f"{mark}\n{table}")


def main(text: str, output: str, family: str) -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    folder = Path(output)
    texts = split(Path(text), folder)
    data = DataConfig(data=str(texts[0]), valid_data=str(texts[1]), vocab_size=1024, cache=str(folder / "cache"))
    prepared = prepare(data, seed=0)
    shape, models = SHAPES[family], folder / family

    stock = pretrain(shape, models / "stock", prepared, PRETRAINING, alibi=False)
    further = pretrain(shape, models / "stock-further", prepared, FINE_TUNING, start=stock, alibi=False)
    converted = save(convert(transformers.AutoModelForCausalLM.from_pretrained(stock)), models / "converted", prepared)
    retrofitted = fine_tune(stock, models / "retrofitted", texts)
    thrice = fine_tune(stock, models / "retrofitted-thrice", texts, steps=3 * FINE_TUNING)
    native = pretrain(shape, models / "native", prepared, PRETRAINING + FINE_TUNING, alibi=True)
    retrofitting = {
        f"{POSITIONS[family]}, {PRETRAINING} steps": stock,
        f"the same, {FINE_TUNING} steps more": further,
        "converted to ALiBi, not yet trained": converted,
        f"converted to ALiBi, {FINE_TUNING} steps more": retrofitted,
        f"converted to ALiBi, {3 * FINE_TUNING} steps more": thrice,
        f"with ALiBi from the start, {PRETRAINING + FINE_TUNING} steps": native,
    }
    fill(f"retrofitting {family}", [row(label, model, texts[1]) for label, model in retrofitting.items()])

    longer, method = 4 * LENGTH, "alibi:scaling=linear-fixed=4"
    scaled = save(extend(load_pretrained(native), scaling="linear-fixed=4"), models / "scaled", prepared)
    lengthening = {
        f"ALiBi, trained at {LENGTH}": native,
        f"{FINE_TUNING} steps more at {LENGTH}": fine_tune(native, models / "native-further", texts),
        f"{FINE_TUNING} steps at {longer}": fine_tune(native, models / "longer", texts, length=longer),
        "factor 0.25, not yet trained": scaled,
        f"factor 0.25, {FINE_TUNING} steps at {longer}": fine_tune(
            native, models / "longer-scaled", texts, length=longer, method=method
        ),
    }
    fill(f"lengthening {family}", [row(label, model, texts[1]) for label, model in lengthening.items()])


if __name__ == "__main__":
    main(*sys.argv[1:])
