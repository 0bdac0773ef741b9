"""Heads against their equations in float64."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from published import Published, expected, write

import longreach

pytestmark = pytest.mark.transformers  # whose classes the models are of

IDS = torch.tensor([[2, 7, 8, 9, 3], [2, 9, 3, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def load(published, folder, **options):
    return longreach.load_encoder(write(published, folder), dtype=torch.float64, **options)


@torch.no_grad()
@pytest.mark.parametrize("layout", ["jina", "mosaic"])
def test_masked_language_model(layout, tmp_path):
    published = Published(layout, head="lm", prefix="bert.")
    weights = published.weights()
    model = load(published, tmp_path, head="masked-lm")
    wide = {name: x.double() for name, x in weights.items()}
    at = "cls.predictions"
    hidden = expected(published, weights, IDS[0])
    inner = F.gelu(hidden @ wide[f"{at}.transform.dense.weight"].T + wide[f"{at}.transform.dense.bias"])
    norm = (wide[f"{at}.transform.LayerNorm.{part}"] for part in ("weight", "bias"))
    bias = wide[f"{at}.bias" if layout == "jina" else f"{at}.decoder.bias"]
    logits = F.layer_norm(inner, (48,), *norm, 1e-12) @ wide["bert.embeddings.word_embeddings.weight"].T + bias
    labels = torch.tensor([[-100, 0, 8, -100, 3], [-100] * 5])
    output = model(IDS, MASK, labels=labels)
    torch.testing.assert_close(output.logits[0], logits, rtol=1e-6, atol=1e-6)
    likelihoods = logits.log_softmax(-1)[[1, 2, 4], [0, 8, 3]]  # label 0 is a token as any other
    torch.testing.assert_close(output.loss, -likelihoods.mean(), rtol=1e-6, atol=1e-6)
    assert torch.equal(model(IDS, MASK, return_dict=False)[0], output.logits)
    model.save_pretrained(tmp_path / "saved")
    again = longreach.load_encoder(tmp_path / "saved", head="masked-lm")
    assert torch.equal(again(IDS, MASK).logits, output.logits)


def test_a_decoder_that_is_not_tied_is_refused_and_one_that_is_is_not(tmp_path):
    published = Published("mosaic", head="lm", layers=1)
    weights = published.weights()
    words = weights["embeddings.word_embeddings.weight"].clone()
    decoder = {"cls.predictions.decoder.weight": words}
    longreach.load_encoder(write(published, tmp_path, weights=weights | decoder), head="masked-lm")
    words[0, 0] += 1
    with pytest.raises(ValueError, match=r"cls.predictions.decoder.weight is not the word embeddings"):
        longreach.load_encoder(write(published, tmp_path, weights=weights | decoder), head="masked-lm")


@torch.no_grad()
@pytest.mark.parametrize("words", [60, 9])
@pytest.mark.parametrize("layout", ["jina", "mosaic"])
def test_a_masked_language_model_of_more_or_fewer_words(layout, words, tmp_path):
    model = load(Published(layout, layers=1, head="lm"), tmp_path / "model", head="masked-lm")
    before, bias = model(IDS[:, 1:2]).logits, model.cls.predictions.decoder.bias
    model.resize_token_embeddings(40)
    assert model.cls.predictions.decoder.bias is bias  # which an optimizer may have
    model.resize_token_embeddings(words)
    kept = min(words, 40)
    output = model(IDS[:, 1:2].clamp(max=kept - 1))
    assert output.logits.shape == (2, 1, words)
    torch.testing.assert_close(output.logits[0, :, :kept], before[0, :, :kept])
    assert not model.cls.predictions.decoder.bias[40:].any()
    assert model.cls.predictions.decoder.bias.requires_grad
    model.save_pretrained(tmp_path / "saved")
    again = longreach.load_encoder(tmp_path / "saved", head="masked-lm")
    assert again.config.vocab_size == words
    assert torch.equal(again(IDS[:, 1:2].clamp(max=kept - 1)).logits, output.logits)


def test_a_masked_language_model_needs_its_head(jina):
    with pytest.raises(ValueError, match=r"has no weight cls.predictions.decoder.bias and 4 others"):
        longreach.load_encoder(jina, head="masked-lm")


@torch.no_grad()
def test_reranker(reranker):
    """Its score is the classifier's logit of the pooled first token; its configuration says nothing of labels."""
    published = Published("jina", prefix="bert.", head="classifier")
    weights = published.weights()
    model = longreach.load_encoder(reranker, head="classification", dtype=torch.float64)
    wide = {name: x.double() for name, x in weights.items()}
    first = expected(published, weights, IDS[1, :3])[0]
    pooled = (first @ wide["bert.pooler.dense.weight"].T + wide["bert.pooler.dense.bias"]).tanh()
    score = pooled @ wide["classifier.weight"].T + wide["classifier.bias"]
    for ids, mask in ((IDS, MASK), (IDS.roll(2, dims=1), MASK.roll(2, dims=1))):  # the second row padded left, too
        torch.testing.assert_close(model(ids, mask).logits[1], score, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("labels", "given", "loss"),
    [
        (1, torch.tensor([0.5, 2.0]), lambda logits, y: (logits[:, 0] - y).square().mean()),
        (3, torch.tensor([2, 0]), lambda logits, y: -logits.log_softmax(-1)[[0, 1], y].mean()),
        (3, torch.tensor([[1.0, 0, 0], [0, 1, 1]]), lambda logits, y: -F.logsigmoid((2 * y - 1) * logits).mean()),
    ],
)
def test_classifiers_have_a_loss_for_their_labels(labels, given, loss, tmp_path):
    model = load(Published("jina", layers=1, head="classifier", labels=labels), tmp_path, head="classification")
    output = model(IDS, MASK, labels=given.double() if given.is_floating_point() else given)
    assert output.logits.shape == (2, labels)
    torch.testing.assert_close(output.loss, loss(output.logits, given))


def test_an_encoder_begins_a_new_classifier_and_says_so(tmp_path):
    published = Published("mosaic", layers=1, prefix="bert.")
    weights = {name: x for name, x in published.weights().items() if "pooler" not in name}
    folder = write(published, tmp_path, weights=weights)
    with pytest.warns(UserWarning, match=r"has no classifier: classifier and bert.pooler.dense are new, train them"):
        model = longreach.load_encoder(folder, head="classification")
    model(IDS, MASK, labels=torch.tensor([0, 1])).loss.backward()
    assert model.bert.encoder.layer[0].attention.self.Wqkv.weight.grad.any()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"architectures": [3]}, r"config.json: architectures\[0\]=3: give text"),
        ({"architectures": "Bert"}, "config.json: architectures='Bert': give a list"),
        ({"classifier_dropout": 5}, "config.json: classifier_dropout=5.0: give a number of at least 0 and below 1"),
    ],
)
def test_a_configuration_that_no_classifier_can_have(values, said, tmp_path):
    published = Published("jina", layers=1, head="classifier", extra=values)
    with pytest.raises(ValueError, match=f"^model '.*': {said}$"):
        load(published, tmp_path, head="classification")


def test_dropout_before_a_classifier_is_what_its_configuration_says(tmp_path):
    for values, right in (({}, 0.1), ({"classifier_dropout": None}, 0.1), ({"classifier_dropout": 0.0}, 0.0)):
        published = Published("jina", layers=1, head="classifier", extra=values)
        assert load(published, tmp_path, head="classification").dropout.p == right


@pytest.mark.parametrize("lost", ["classifier.weight", "classifier.bias"])
def test_half_a_classifier_is_refused(lost, tmp_path):
    published = Published("jina", layers=1, head="classifier")
    weights = {name: x for name, x in published.weights().items() if name != lost}
    with pytest.raises(ValueError, match=f"has no weight {lost}:"):
        longreach.load_encoder(write(published, tmp_path, weights=weights), head="classification")


def test_a_reranker_without_its_classifier_is_refused(tmp_path):
    architectures = {"architectures": ["JinaBertForSequenceClassification"]}
    with pytest.raises(ValueError, match=r"has no weight classifier.bias and 1 others"):
        load(Published("jina", layers=1, extra=architectures), tmp_path, head="classification")


def test_heads_are_left_aside_where_none_is_asked_for(reranker, dnabert, tmp_path):
    published = Published("jina", layers=1, prefix="bert.")
    projection = {"linear.weight": torch.zeros(8, 48)}
    colbert = write(published, tmp_path, weights=published.weights() | projection)
    for folder in (reranker, dnabert, colbert):
        assert longreach.load_encoder(folder)(IDS, MASK).last_hidden_state.isfinite().all()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # by peft
def test_adapters_of_peft_are_trained_and_merged(jina):
    model = longreach.load_encoder(jina)
    before = model(IDS, MASK).last_hidden_state
    adapted = get_peft_model(model, LoraConfig(target_modules=["query", "value"], r=2))
    trained = [x for x in adapted.parameters() if x.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.1)
    for _ in range(2):  # the first step leaves one of the two factors at 0
        optimizer.zero_grad()
        adapted(input_ids=IDS, attention_mask=MASK).last_hidden_state[:, 0].square().mean().backward()
        optimizer.step()
    after = adapted.eval()(input_ids=IDS, attention_mask=MASK).last_hidden_state
    assert (after - before).abs().max() > 1e-2
    torch.testing.assert_close(adapted.merge_and_unload()(IDS, MASK).last_hidden_state, after, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # by peft
@pytest.mark.parametrize(
    ("head", "task"), [("none", TaskType.FEATURE_EXTRACTION), ("classification", TaskType.SEQ_CLS)]
)
def test_adapters_for_a_task_are_saved_and_loaded(head, task, reranker, tmp_path):
    """For a task PEFT passes on all that BERT's own forward takes."""
    config = LoraConfig(task_type=task, target_modules=["query", "value"], r=2, init_lora_weights=False)
    adapted = get_peft_model(longreach.load_encoder(reranker, head=head), config).eval()
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(longreach.load_encoder(reranker, head=head), tmp_path)
    first, second, before = (
        model(input_ids=IDS, attention_mask=MASK, return_dict=False)[0]
        for model in (adapted, again, longreach.load_encoder(reranker, head=head))
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, before)


@torch.no_grad()
@pytest.mark.parametrize(("head", "folder"), [("masked-lm", "dnabert"), ("classification", "reranker")])
def test_what_is_returned_is_as_asked_for_or_as_the_configuration_says(head, folder, request):
    model = longreach.load_encoder(request.getfixturevalue(folder), head=head)
    plain, asked = model(IDS, MASK), model(IDS, MASK, output_hidden_states=True)
    assert plain.hidden_states is None
    assert torch.equal(asked.hidden_states[-1], model.bert(IDS, MASK).last_hidden_state)
    model.config.output_hidden_states, model.config.return_dict = True, False
    logits, states = model(IDS, MASK)
    assert torch.equal(logits, plain.logits)
    assert len(states) == len(asked.hidden_states)
    assert len(model.bert(IDS, MASK)) == 3
    assert torch.equal(model(IDS, MASK, output_hidden_states=False, return_dict=True).logits, logits)
    with pytest.raises(ValueError, match="output_attentions=True: attention weights are never made"):
        model(IDS, MASK, output_attentions=True)


def test_weights_of_other_widths_of_the_classifier_are_named(tmp_path):
    published = replace(Published("jina", layers=1, head="classifier"), labels=2)
    weights = published.weights() | {"classifier.bias": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"classifier.bias has shape \(3,\)"):
        longreach.load_encoder(write(published, tmp_path, weights=weights), head="classification")
