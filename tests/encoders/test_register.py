"""transformers and sentence-transformers, with encoders registered and without."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from published import Published, write
from sentence_transformers import CrossEncoder, SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

import longreach
from longreach.encoders.heads import EncoderForMaskedLM
from longreach.encoders.model import EncoderModel, PublishedConfig

TEXTS = ["the cat runs.", "", "and another word, again: 1 2 3", "dog " * 50]
IDS = torch.tensor([[2, 7, 8, 9, 3]])

pytestmark = pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*:DeprecationWarning")


@pytest.fixture
def registered():
    longreach.register_encoders()
    yield
    longreach.unregister_encoders()


@pytest.fixture
def bert(tmp_path):
    """Ordinary BERT."""
    sizes = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 40}
    transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(tmp_path / "bert")
    return str(tmp_path / "bert")


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("trusting", [True, False, None])
def test_auto_classes_load_encoders_and_never_code(jina, dnabert, reranker, trusting):
    """Both kinds of configuration name code that does not exist here: to run it would fail."""
    options = {"trust_remote_code": trusting}
    for folder in (jina, dnabert, reranker):
        model = transformers.AutoModel.from_pretrained(folder, **options)
        assert type(model) is EncoderModel
        right = longreach.load_encoder(folder)
        assert torch.equal(model(IDS).last_hidden_state, right(IDS).last_hidden_state)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
        assert tokenizer("the cat")["input_ids"][0] == 2
    assert type(transformers.AutoModelForMaskedLM.from_pretrained(dnabert, **options)) is EncoderForMaskedLM
    model = transformers.AutoModelForSequenceClassification.from_pretrained(reranker, **options)
    assert model(IDS).logits.shape == (1, 1)
    assert torch.equal(
        transformers.AutoModel.from_pretrained(jina, dtype=torch.bfloat16, **options)(IDS)[0],
        longreach.load_encoder(jina, dtype=torch.bfloat16)(IDS)[0],
    )


def test_ordinary_bert_stays_stock_and_all_is_undone(bert, jina):
    stock = transformers.AutoConfig.__dict__["from_pretrained"]
    longreach.register_encoders()
    longreach.register_encoders()  # changes nothing more
    try:
        assert type(transformers.AutoModel.from_pretrained(bert)) is transformers.BertModel
        assert type(transformers.AutoConfig.from_pretrained(jina)) is PublishedConfig
        with pytest.raises(OSError, match="connect"):
            transformers.AutoConfig.from_pretrained("no/such-model")
    finally:
        longreach.unregister_encoders()
        longreach.unregister_encoders()
    assert transformers.AutoConfig.__dict__["from_pretrained"] is stock
    assert type(transformers.AutoConfig.from_pretrained(jina)) is transformers.BertConfig
    assert type(transformers.AutoModel.from_pretrained(bert)) is transformers.BertModel


@pytest.mark.usefixtures("registered")
def test_auto_classes_refuse_what_load_encoder_refuses(jina, tmp_path):
    published = Published("jina", layers=1)
    weights = published.weights()
    del weights["encoder.layer.0.mlp.wo.bias"]
    with pytest.raises(ValueError, match=r"has no weight encoder.layer.0.mlp.wo.bias"):
        transformers.AutoModel.from_pretrained(write(published, tmp_path, weights=weights))
    for device in ("auto", "cpu"):
        said = f"device_map='{device}': encoders of longreach have no such option; leave it out, and move"
        with pytest.raises(ValueError, match=said):
            transformers.AutoModel.from_pretrained(jina, device_map=device)
    with pytest.raises(ValueError, match=r"key_mapping={}: encoders of longreach have no such option; leave it out$"):
        transformers.AutoModel.from_pretrained(jina, key_mapping={})
    right = longreach.load_encoder(jina)(IDS)[0]
    assert torch.equal(transformers.AutoModel.from_pretrained(jina, use_safetensors=True)(IDS)[0], right)
    assert torch.equal(transformers.AutoModel.from_pretrained(jina, weights_only=True)(IDS)[0], right)


@pytest.mark.usefixtures("registered")
def test_sentence_transformers_and_cross_encoders(jina, reranker, tmp_path):
    model = SentenceTransformer(jina, trust_remote_code=True)
    right = longreach.load_encoder(jina).encode(TEXTS)
    assert type(model[0].auto_model) is EncoderModel
    assert model.max_seq_length == 8192
    torch.testing.assert_close(model.encode(TEXTS, convert_to_tensor=True).cpu(), right)
    model.prompts = {"query": "the "}
    model.save(str(tmp_path / "saved"))
    assert SentenceTransformer(str(tmp_path / "saved")).prompts["query"] == "the "
    assert "auto_map" not in json.loads((tmp_path / "saved/config.json").read_text())
    torch.testing.assert_close(SentenceTransformer(str(tmp_path / "saved")).encode(TEXTS), right.numpy())
    torch.testing.assert_close(longreach.load_encoder(tmp_path / "saved").encode(TEXTS), right)
    scores = CrossEncoder(reranker).predict([("the cat", "dog runs"), ("a", "b")], activation_fn=torch.nn.Identity())
    ids = torch.tensor([[2, 5, 18, 3, 19, 20, 3]])
    types = torch.tensor([[0, 0, 0, 0, 1, 1, 1]])
    tokenizer = transformers.AutoTokenizer.from_pretrained(reranker)
    assert tokenizer("the cat", "dog runs")["token_type_ids"] == types[0].tolist()
    ids = torch.tensor([tokenizer("the cat", "dog runs")["input_ids"]])
    logit = longreach.load_encoder(reranker, head="classification")(ids, token_type_ids=types).logits
    torch.testing.assert_close(float(scores[0]), logit.item())


@pytest.mark.usefixtures("registered")
def test_an_adapter_is_saved_and_loaded_with_its_encoder(jina, tmp_path):
    """Its folder holds no more of the encoder than its name."""
    model = SentenceTransformer(jina)
    before = model.encode(TEXTS)
    config = LoraConfig(target_modules=["query", "value"], r=2, lora_dropout=0.5, init_lora_weights=False)
    model.add_adapter(config)
    after = model.encode(TEXTS)
    assert abs(after - before).max() > 1e-3
    model.save(str(tmp_path / "adapter"))
    assert not (tmp_path / "adapter/config.json").exists()
    assert (SentenceTransformer(str(tmp_path / "adapter")).encode(TEXTS) == after).all()
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "adapter")
    assert torch.equal(loaded(IDS)[0], loaded(IDS)[0])  # nothing is dropped
    weights = safetensors.torch.load_file(tmp_path / "adapter/adapter_model.safetensors")
    weights.popitem()
    safetensors.torch.save_file(weights, tmp_path / "adapter/adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"^adapter '.*adapter' cannot be put on .*lora_[AB]\.default\.weight"):
        transformers.AutoModel.from_pretrained(tmp_path / "adapter")


class Ours(Transformer):
    """sentence-transformers' module with an encoder of ours in it, for one model instead of the whole process."""

    def _load_config(self, name, *_):
        return PublishedConfig.from_pretrained(name), False

    def _load_model(self, name, *_, **options):
        return longreach.load_encoder(name)


def test_sentence_transformers_without_registration(jina):
    model = SentenceTransformer(modules=[Ours(jina), Pooling(48, "mean")])
    right = longreach.load_encoder(jina).encode(TEXTS, normalize=False)
    torch.testing.assert_close(model.encode(TEXTS, convert_to_tensor=True).cpu(), right)


@pytest.mark.usefixtures("registered")
@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_the_trainer_of_sentence_transformers_trains(jina, tmp_path):
    model = SentenceTransformer(jina)
    before = model[0].auto_model.encoder.layer[0].mlp.wo.weight.detach().clone()
    data = Dataset.from_dict({"anchor": TEXTS[2:], "positive": ["a word again", "the dog"]})
    arguments = Arguments(
        output_dir=str(tmp_path / "out"),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_checkpointing=True,
        report_to="none",
        save_strategy="steps",
        save_steps=2,
        disable_tqdm=True,
        use_cpu=True,
    )
    SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=data, loss=MultipleNegativesRankingLoss(model)
    ).train()
    assert not torch.equal(model[0].auto_model.encoder.layer[0].mlp.wo.weight, before)
    (checkpoint,) = Path(tmp_path, "out").glob("checkpoint-*")
    vectors = longreach.load_encoder(checkpoint).encode(TEXTS)
    torch.testing.assert_close(vectors, model.encode(TEXTS, convert_to_tensor=True).cpu())
