"""Fine-tuning an extended model that is not scaled has the losses of fine-tuning the stock one, step by step."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from family_models import FAMILIES, in_float64, tokens

import longreach

pytestmark = pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")

STEPS = 20
LENGTH = 24
DOCUMENTS = (19, 29)  # packed into one row


def padded(step):
    """Two rows, one of them padded, on the left and on the right in turn; the same again after four steps."""
    ids, mask = tokens(2, LENGTH, seed=step % 4), torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, : 3 * (step % 4)] = 0
    mask = mask.flip(1) if step % 2 else mask
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 1:][mask[:, :-1] == 0] = -100  # what padding says of the first token means nothing
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def packed(step):
    ids = tokens(1, sum(DOCUMENTS), seed=step % 4)
    labels = ids.clone()
    labels[:, DOCUMENTS[0]] = -100  # the first of a document is no document's next token
    positions = torch.cat([torch.arange(length) for length in DOCUMENTS])[None]
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


def loss_apart(model, batch):
    """Of packed documents, each read by itself: not every stock model knows of packing."""
    pieces = batch["input_ids"].split(DOCUMENTS, dim=1)
    sums = [(len(ids[0]) - 1) * model(ids, labels=ids, use_cache=False).loss for ids in pieces]
    return sum(sums) / (sum(DOCUMENTS) - len(DOCUMENTS))


def losses(model, batches, loss_of=lambda model, batch: model(**batch, use_cache=False).loss):
    """Of each step of a training of a model in place; without dropout, which these configurations have none of."""
    model.train()
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.05, momentum=0.9)
    found = []
    with in_float64():
        for batch in batches:
            loss = loss_of(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
    return found


def require_equal(found, expected):
    assert len(found) == STEPS
    assert found[4] != found[0]  # of the same batch: it trained
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=0, atol=1e-6)


def plain_and_extended(family):
    model = FAMILIES[family]().double()
    return model, longreach.extend(copy.deepcopy(model), scaling="none")


@pytest.mark.parametrize("how", ["plain", "reentrant", "not reentrant", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batches(family, how):
    found = []
    for model in plain_and_extended(family):
        if how == "lora":
            peft = pytest.importorskip("peft", reason="peft is not installed")
            torch.manual_seed(0)
            target = "Wqkv" if family == "mpt" else "query_key_value"
            model = peft.get_peft_model(model, peft.LoraConfig(target_modules=[target], task_type="CAUSAL_LM"))
        elif how != "plain":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": how == "reentrant"})
            model.enable_input_require_grads()
        found.append(losses(model, map(padded, range(STEPS))))
    require_equal(found[1], found[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents(family):
    stock, extended = plain_and_extended(family)
    expected = losses(stock, map(packed, range(STEPS)), loss_apart)
    require_equal(losses(extended, map(packed, range(STEPS))), expected)


class Noting(transformers.Trainer):
    """A trainer that notes the loss of each step."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.found.append(loss.item())
        return loss


def trainer(model, folder):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        save_steps=STEPS // 2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = [{key: value[row] for key, value in padded(step).items()} for step in range(7) for row in range(2)]
    made = Noting(model, arguments, train_dataset=rows)
    made.found = []
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trainer_that_resumes(family, tmp_path):
    stock, extended = plain_and_extended(family)
    fresh = copy.deepcopy(extended)
    expected = trainer(stock, tmp_path / "stock")
    with in_float64():
        expected.train()
    whole = trainer(extended, tmp_path / "extended")
    whole.train()
    require_equal(whole.found, expected.found)
    resumed = trainer(fresh, tmp_path / "again")
    resumed.train(resume_from_checkpoint=str(tmp_path / "extended" / f"checkpoint-{STEPS // 2}"))
    require_equal(whole.found[: STEPS // 2] + resumed.found, expected.found)


def test_two_processes(tmp_path):
    command = [sys.executable, str(Path(__file__).with_name("ddp_ranks.py"))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    where = [str(tmp_path / "store"), str(tmp_path / "losses.json")]
    ranks = [
        subprocess.Popen([*command, str(rank), *where], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    for stock, extended in json.loads(Path(where[1]).read_text()).values():
        require_equal(extended, stock)
