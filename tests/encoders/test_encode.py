"""Texts to vectors."""

import json
from pathlib import Path

import pytest
import torch
from published import WORDS, Published, expected, write, write_pooling, write_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

import longreach
from longreach.encoders import encode
from longreach.encoders.encode import texts_of, tokenize

TEXTS = ["the cat runs.", "", "and another word, again: 1 2 3", "dog " * 50, "is", "the cat runs."]


def rows(folder, texts, published, **truncation):
    """Hidden states of each text alone, by the equations."""
    tokenizer = Tokenizer.from_file(str(Path(folder, "tokenizer.json")))
    if truncation:
        tokenizer.enable_truncation(**truncation)
    weights = published.weights()
    return [expected(published, weights, torch.tensor(tokenizer.encode(text).ids)) for text in texts]


POOLINGS = {
    "mean": lambda states: states.mean(0),
    "cls": lambda states: states[0],
    "max": lambda states: states.amax(0),
}


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_vectors_are_pooled_as_the_files_say(pooling, normalize, tmp_path):
    published = Published("jina", layers=1)
    model = longreach.load_encoder(write(published, tmp_path, pooling=(pooling, normalize)), dtype=torch.float64)
    right = torch.stack([POOLINGS[pooling](states) for states in rows(tmp_path, TEXTS, published)])
    length = right.norm(dim=1, keepdim=True)
    vectors = model.encode(TEXTS)
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors.double(), right / length if normalize else right, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.encode(TEXTS, normalize=True).double(), right / length, rtol=1e-5, atol=1e-6)


def test_pooling_without_modules_is_what_the_configuration_says(tmp_path):
    model = longreach.load_encoder(write(Published("jina", layers=1, extra={"emb_pooler": "cls"}), tmp_path))
    vectors = model.encode(TEXTS)  # before there are modules
    write_pooling(tmp_path, "cls", False)
    assert torch.equal(vectors, longreach.load_encoder(tmp_path).encode(TEXTS))
    write_pooling(tmp_path, "mean", False)
    assert not torch.equal(vectors, longreach.load_encoder(tmp_path).encode(TEXTS))


def test_pooling_as_later_versions_write_it_and_as_nobody_knows_it(tmp_path):
    model = longreach.load_encoder(write(Published("jina", layers=1), tmp_path, pooling=("mean", False)))
    mean = model.encode(TEXTS)
    config = tmp_path / "1_Pooling/config.json"
    config.write_text(json.dumps({"pooling_mode": "mean", "embedding_dimension": 48}))
    assert torch.equal(longreach.load_encoder(tmp_path).encode(TEXTS), mean)
    for values, said in (
        ({"pooling_mode": "lasttoken"}, "its pooling is lasttoken"),
        ({"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}, "its pooling is cls and max"),
        ({}, "its pooling is none"),
    ):
        config.write_text(json.dumps(values))
        with pytest.raises(ValueError, match=said):
            longreach.load_encoder(tmp_path).encode(TEXTS)
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Dense", "path": "2"}]))
    with pytest.raises(ValueError, match=r"modules.json has a Dense: load it with sentence-transformers"):
        longreach.load_encoder(tmp_path).encode(TEXTS)


def test_a_vector_is_that_of_its_text_alone_whatever_the_batch(jina, monkeypatch):
    model = longreach.load_encoder(jina)
    alone = torch.cat([model.encode([text]) for text in TEXTS])
    sizes = []
    run = model.encode_packed
    monkeypatch.setattr(model, "encode_packed", lambda ids, packed: (sizes.append(packed.lengths), run(ids, packed))[1])
    torch.testing.assert_close(model.encode(TEXTS), alone)
    assert [sum(lengths) for lengths in sizes] == [2 + 3 + 6 + 6 + 11 + 52]  # no padding in it
    monkeypatch.setattr(encode, "TOKENS_PER_BATCH", 20)
    torch.testing.assert_close(model.encode(TEXTS, batch_size=4), alone)
    assert sizes[1:] == [(6, 6), (11,), (52,), (2, 3)]


def test_long_texts_are_cut_off(tmp_path):
    published = Published("mosaic", layers=1)
    model = longreach.load_encoder(write(published, tmp_path), dtype=torch.float64)
    (states,) = rows(tmp_path, [TEXTS[3]], published, max_length=7)
    torch.testing.assert_close(model.encode([TEXTS[3]], max_length=7)[0].double(), states.mean(0), rtol=1e-5, atol=1e-6)


class Listening:
    """A tokenizer that notes how much it was given to read."""

    def __init__(self, library):
        self.library, self.most = library, 0

    def __getattr__(self, name):
        return getattr(self.library, name)

    def encode_batch_fast(self, texts, **options):
        self.most = max(self.most, *map(len, texts))
        return self.library.encode_batch_fast(texts, **options)


@pytest.mark.parametrize(
    ("text", "most"),
    [
        ("dog " * 10_000, 16 * (9 + 256)),
        ("the" + " " * 30_000 + "cat runs " * 9999, 16 * (9 + 256) * 8),
        ("a" * 30_000 + " cat" * 9999, 16 * (9 + 256) * 8),
    ],
)
def test_no_more_is_read_of_a_text_than_makes_its_tokens(text, most, jina):
    """Many blanks make no token, and a long word makes one."""
    model = longreach.load_encoder(jina)
    backend = texts_of(model).tokenizer
    backend.library = listening = Listening(backend.library)
    (ids,) = tokenize(model, [text], length=9)
    assert listening.most == most
    whole = Tokenizer.from_file(str(Path(jina, "tokenizer.json"))).encode(text).ids
    assert ids == [*whole[:8], whole[-1]]


def word_pieces():
    words = ["[UNK]", "[CLS]", "[SEP]", "cat", *"abnostux", *("##" + letter for letter in "abcnostux")]
    tokenizer = Tokenizer(models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    tokenizer.add_tokens(["cat nap", "[stub]"])
    return tokenizer


def trained(model, trainer, **parts):
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator([WORDS * 20, "acgtac gattaca" * 9, "tac" * 99, "ca\u0301fe\u0301"], trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0))
    return tokenizer


def byte_pairs(**parts):
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], show_progress=False)
    return trained(models.BPE(), trainer, **parts)


def unigram(**parts):
    special = ["<s>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=99, special_tokens=special, unk_token="<unk>", show_progress=False)
    return trained(models.Unigram(), trainer, **parts)


TOKENIZERS = {
    "word pieces": word_pieces,
    "bytes": lambda: byte_pairs(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "whole texts": lambda: byte_pairs(normalizer=normalizers.Sequence([normalizers.Strip(), normalizers.NFC()])),
    "sentence pieces": lambda: unigram(pre_tokenizer=pre_tokenizers.Metaspace()),
    "sentences": unigram,
}

CUT = {
    "a word that is too long": "x" * 3000,
    "long words": "".join(f"{'tacb' * (n % 29)} cat " for n in range(199)),
    "a sequence": "".join("acgt"[n * n // 7 % 4] for n in range(5000)),
    "blanks": "".join("cat" + " " * (n % 61) + "another" for n in range(199)),
    "accents": "cafe\u0301 " * 999 + "e" + "\u0301" * 999,
    "added tokens": "cat nap cat napx [stub] [stubs] cat [stub" * 99,
}


@pytest.mark.parametrize("text", CUT)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_ids_are_those_of_the_whole_text_wherever_it_is_cut(kind, text, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "CHARS_PER_TOKEN", 1)  # so that it is cut near the tokens that are wanted
    folder = write(Published("jina", layers=1, vocab=512), tmp_path)
    whole = TOKENIZERS[kind]()
    whole.save(str(tmp_path / "tokenizer.json"))
    model = longreach.load_encoder(folder)
    for length in (2, 3, 4, 5, 6, 7, 17, 100, 101, 600):
        for special in (True, False):
            whole.enable_truncation(length)
            right = whole.encode(CUT[text], add_special_tokens=special).ids
            assert tokenize(model, ["", CUT[text]], length=length, special=special)[1] == right


def test_tokens_may_be_added(jina, tmp_path):
    tokenizer = Tokenizer.from_file(str(Path(jina, "tokenizer.json")))
    tokenizer.add_tokens([f"word{n}" for n in range(30)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    model = longreach.load_encoder(jina, tokenizer=tmp_path)
    with pytest.raises(ValueError, match=r"its tokenizer makes the token 5\d of vocab_size=40: give its own tokenizer"):
        model.encode(["a word29"])
    before = model.encode(["a cat"])
    model.resize_token_embeddings(60, mean_resizing=False)
    assert torch.equal(model.encode(["a cat"]), before)
    vectors = model.encode(["a word29"])
    model.save_pretrained(tmp_path / "saved")
    again = longreach.load_encoder(tmp_path / "saved")
    assert again.config.vocab_size == 60
    assert torch.equal(again.encode(["a word29"]), vectors)
    model.resize_token_embeddings(9)
    with pytest.raises(ValueError, match="of vocab_size=9"):
        model.encode(["a cat runs"])


def test_the_longest_text_of_mosaic_is_that_of_its_table(tmp_path):
    """Nothing else of it has a length; what BERT says of positions is left as it was."""
    published = Published("mosaic", layers=1, extra={"alibi_starting_size": 20, "max_position_embeddings": 9})
    model = longreach.load_encoder(write(published, tmp_path))
    assert torch.equal(model.encode([TEXTS[3]]), model.encode([TEXTS[3]], max_length=20))
    assert not torch.equal(model.encode([TEXTS[3]]), model.encode([TEXTS[3]], max_length=9))


def test_the_longest_text_is_what_the_files_say(tmp_path):
    published = Published("jina", layers=1)
    write(published, tmp_path, pooling=("mean", False))
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 9}))
    model = longreach.load_encoder(tmp_path)
    assert torch.equal(model.encode([TEXTS[3]]), model.encode([TEXTS[3]], max_length=9))
    assert not torch.equal(model.encode([TEXTS[3]]), model.encode([TEXTS[3]], max_length=10))


def test_no_texts_make_no_vectors(jina):
    assert longreach.load_encoder(jina).encode([]).shape == (0, 48)


@pytest.mark.parametrize(
    ("texts", "options", "said"),
    [
        ("a text", {}, "texts of str: give a list of texts"),
        (3, {}, "texts of int: give a list"),
        (["a", None], {}, r"texts\[1\] is NoneType: give text"),
        (["a", b"b"], {}, r"texts\[1\] is bytes: give text"),
        (["a"], {"max_length": 0}, "max_length=0: give an integer of at least 1"),
        (["a"], {"max_length": 1.5}, "max_length=1.5: give an integer"),
        (["a"], {"max_length": 2**70}, r"max_length=1180591620717411303424: give an integer of .* below 2\*\*63"),
        (["a"], {"batch_size": True}, "batch_size=True: give an integer"),
        (["a", "a \ud800"], {}, r"texts\[1\] holds half a surrogate pair at character 2: mend or drop it"),
        (["a"], {"max_length": 1}, "max_length=1: its tokenizer adds 2 tokens"),
        (["a"], {"batch_size": -1}, "batch_size=-1: give an integer of at least 1"),
        (["a"], {"normalize": "no"}, "normalize='no': give True or False"),
    ],
)
def test_bad_input_is_named(texts, options, said, jina):
    with pytest.raises(ValueError, match=said):
        longreach.load_encoder(jina).encode(texts, **options)


def test_a_tokenizer_may_be_another_models(tmp_path):
    published = Published("mosaic", layers=1)
    folder = write(published, tmp_path / "mosaic", tokenizer=False)
    with pytest.raises(ValueError, match=r"has no tokenizer.json: give that of its tokenizer by tokenizer="):
        longreach.load_encoder(folder).encode(TEXTS)
    (tmp_path / "bert").mkdir()
    write_tokenizer(tmp_path / "bert")
    model = longreach.load_encoder(folder, tokenizer=tmp_path / "bert")
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(longreach.load_encoder(tmp_path / "saved").encode(TEXTS), model.encode(TEXTS))
    (tmp_path / "bert/tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json is damaged"):
        longreach.load_encoder(folder, tokenizer=tmp_path / "bert").encode(TEXTS)


def test_encoding_tells_its_progress_and_leaves_training_as_it_was(jina, capsys):
    model, told = longreach.load_encoder(jina).train(), []
    vectors = model.encode(TEXTS, batch_size=4, progress=lambda done, total: told.append((done, total)))
    assert told == [(4, 6), (6, 6)]
    assert model.training
    assert torch.equal(model.eval().encode(TEXTS, batch_size=4, progress=True), vectors)
    assert "encoding" in capsys.readouterr().err


def test_an_encoder_without_files_has_no_tokenizer(jina):
    model = longreach.load_encoder(jina)
    with pytest.raises(ValueError, match="was made without files"):
        type(model)(model.config).encode(TEXTS)
