import json
import subprocess
import sys

import huggingface_hub.constants
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from longreach.data.tokenizer import StreamingDecoder, Tokenizer, load_tokenizer, train_tokenizer

# The fixture is immutable in all that these tests use, so that sharing it between examples is sound.
property_test = settings(max_examples=150, deadline=None)
TEXTS = st.lists(
    st.one_of(
        st.text(max_size=8),
        st.sampled_from(
            ["\r\n", "\x00", "\x1b[0m", "🙂🙃", "日本語", "<|endoftext|>", "\ufffd", "  \n\t", "naïve", "\u0301"]
        ),
    ),
    max_size=12,
).map("".join)


def metaspace_tokenizer() -> Tokenizer:
    """A tokenizer of the SentencePiece kind: a space before every text, and bytes where a character is missing."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "▁b"]
    vocab = {token: index for index, token in enumerate(tokens)}
    model = models.BPE(vocab=vocab, merges=[("▁", "a"), ("▁", "b")], unk_token="<unk>", byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(backend, "</s>")


@property_test
@given(text=TEXTS)
def test_round_trip_keeps_every_byte(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.count_bytes(ids) == len(text.encode())
    assert tokenizer.eos_id not in ids
    assert all(0 <= token < tokenizer.vocab_size for token in ids)


@property_test
@given(text=TEXTS, cut=st.integers(0, 100))
def test_byte_counts_add_up_over_any_cut(tokenizer, text, cut):
    ids = [tokenizer.eos_id, *tokenizer.encode(text), tokenizer.eos_id]
    parts = tokenizer.count_bytes(ids[:cut]), tokenizer.count_bytes(np.array(ids[cut:], dtype=np.uint16))
    assert sum(parts) == len(text.encode())


def test_batch_encoding_equals_encoding_one_by_one(tokenizer):
    texts = ["", "one", "two words", "🙂" * 50]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_decoding_leaves_special_tokens_out(tokenizer):
    ids = [tokenizer.eos_id, *tokenizer.encode("text"), tokenizer.eos_id]
    assert tokenizer.decode(ids) == "text"
    assert tokenizer.decode(np.array(ids)) == "text"


@property_test
@given(data=st.data())
def test_streaming_adds_up_to_decoding_whatever_the_tokens(tokenizer, data):
    # Random tokens, so that most are halves of characters in nonsense order, and eos stands anywhere.
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    decoder = StreamingDecoder(tokenizer)
    parts = [decoder.push(token) for token in ids]
    assert "".join(parts) + decoder.finish() == tokenizer.decode(ids)


@property_test
@given(text=TEXTS.filter(lambda text: "\ufffd" not in text))
def test_streaming_never_shows_half_a_character(tokenizer, text):
    decoder = StreamingDecoder(tokenizer)
    ids = tokenizer.encode(text)
    shown = ""
    for position, token in enumerate(ids, start=1):
        shown += decoder.push(token)
        # Whatever is whole must be there at once: the bytes so far, without those of a character begun.
        assert shown == tokenizer.decode(ids[:position]).rstrip("\ufffd")
    assert shown == text
    assert decoder.finish() == ""


def test_streaming_gives_out_what_was_held_back_in_the_end(tokenizer):
    first_byte = tokenizer.encode("🙂")[0]
    decoder = StreamingDecoder(tokenizer)
    assert decoder.push(first_byte) == ""
    assert decoder.finish() == "\ufffd"
    assert decoder.finish() == ""


def test_streaming_keeps_spaces_that_depend_on_the_tokens_before():
    tokenizer = metaspace_tokenizer()
    ids = [*tokenizer.encode("a b 🙂"), tokenizer.eos_id, *tokenizer.encode("a")]
    decoder = StreamingDecoder(tokenizer)
    assert "".join(decoder.push(token) for token in ids) + decoder.finish() == tokenizer.decode(ids) == "a b 🙂 a"


def test_byte_counts_of_a_tokenizer_that_is_not_byte_level():
    tokenizer = metaspace_tokenizer()
    ids = tokenizer.encode("a b 🙂")
    assert tokenizer.decode(ids) == "a b 🙂"
    assert tokenizer.count_bytes([*ids, tokenizer.eos_id]) == len("a b 🙂".encode())


def test_added_tokens_count_their_text_and_special_ones_nothing():
    backend = tokenizers.Tokenizer(models.BPE(vocab={"é": 0, "Ġ": 1, "Ã": 2, "</s>": 3}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken("   ", normalized=False), AddedToken("né", normalized=False)])
    tokenizer = Tokenizer(backend, "</s>")
    # In the byte alphabet "é", "Ġ" and "Ã" stand for one byte each: 0xe9, a space, 0xc3.
    assert [tokenizer.count_bytes([token]) for token in range(6)] == [1, 1, 1, 0, 3, 3]


def test_training_is_deterministic_across_processes_and_threads():
    script = (
        "import hashlib; from longreach.data.tokenizer import train_tokenizer;"
        "words = [hashlib.sha256(bytes([i % 251, i % 13])).hexdigest()[: 3 + i % 9] for i in range(20000)];"
        "texts = [' '.join(words[i : i + 500]) for i in range(0, 20000, 500)];"
        "print(train_tokenizer(texts, 1000).fingerprint)"
    )
    fingerprints = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in ("1", "2", "5")
    }
    assert len(fingerprints) == 1


def test_training_fills_the_vocabulary_or_what_the_text_allows():
    words = " ".join(f"{i * 7919:x}" for i in range(5000))
    assert train_tokenizer([words], 300).vocab_size == 300
    assert train_tokenizer(["aaaa"], 300).vocab_size < 300
    assert train_tokenizer([], 257).vocab_size == 257
    with pytest.raises(ValueError, match=r"vocab_size=256 has no room for 256 bytes and eos; give 257 or more"):
        train_tokenizer(["a"], 256)


def test_saved_tokenizer_is_loaded_the_same_by_us_and_by_hugging_face(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    text = "best of times\r\n naïve 🙂"
    for source in (tmp_path, str(tmp_path / "tokenizer.json")):
        loaded = load_tokenizer(source)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert (loaded.eos_id, loaded.vocab_size) == (tokenizer.eos_id, tokenizer.vocab_size)
        assert loaded.encode(text) == tokenizer.encode(text)
    stock = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert stock.encode(text).ids == tokenizer.encode(text)
    assert stock.decode(tokenizer.encode(text)) == text
    assert stock.encode("<|endoftext|>").ids == [tokenizer.eos_id]
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["eos_token"] == "<|endoftext|>"


def test_fingerprint_tells_tokenizers_apart(tokenizer):
    other = train_tokenizer(["something else entirely, else entirely"], vocab_size=270)
    assert other.fingerprint != tokenizer.fingerprint
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    ends = [Tokenizer(tokenizers.Tokenizer.from_str(backend.to_str()), eos).fingerprint for eos in ("a", "b")]
    assert ends[0] != ends[1]


def test_truncation_and_padding_of_a_foreign_tokenizer_are_switched_off(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    stock = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    stock.enable_truncation(2)
    stock.enable_padding(length=50)
    stock.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("a b c d e") == tokenizer.encode("a b c d e")


def save_plain(folder, *vocab: str) -> None:
    backend = tokenizers.Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(vocab)}, merges=[]))
    backend.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize(
    ("files", "eos"),
    [
        ({}, "</s>"),  # the first of the known ones
        ({"tokenizer_config.json": {"eos_token": "<end>"}}, "<end>"),
        ({"tokenizer_config.json": {"eos_token": {"content": "<end>", "lstrip": False}}}, "<end>"),
        ({"tokenizer_config.json": {"eos_token": None}, "special_tokens_map.json": {"eos_token": "a"}}, "a"),
        ({"special_tokens_map.json": {"eos_token": {"content": "<end>"}}}, "<end>"),
    ],
)
def test_eos_is_the_declared_one_or_a_known_one(tmp_path, files, eos):
    save_plain(tmp_path, "a", "<eos>", "</s>", "<end>")
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_token == eos
    assert tokenizer.eos_id == ["a", "<eos>", "</s>", "<end>"].index(eos)
    assert tokenizer.count_bytes([tokenizer.eos_id]) == 0


def test_tokenizers_that_cannot_be_had(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"tokenizer='.*/none\.json': no such file; give a tokenizer\.json"):
        load_tokenizer(tmp_path / "none.json")
    with pytest.raises(ValueError, match="no such file"):
        load_tokenizer(tmp_path)  # a folder without tokenizer.json
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is no tokenizer\.json \(.*\); write or fetch it again"):
        load_tokenizer(tmp_path)
    save_plain(tmp_path, "a", "b")
    with pytest.raises(ValueError, match=r"no eos token is declared or known; put a tokenizer_config\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "c"}')
    with pytest.raises(ValueError, match="eos_token='c' is not in the vocabulary"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json': not a JSON file"):
        load_tokenizer(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ValueError, match=r"tokenizer='no-such/name' is no file or folder here, nor .*hub name while"
    ) as error:
        load_tokenizer("no-such/name")
    assert "\n" not in str(error.value)


def test_added_special_tokens_need_no_room_in_a_model(tmp_path):
    trained = train_tokenizer(["some text"], 260)
    trained.save(tmp_path / "tokenizer.json")
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.add_special_tokens(["<pad>"])
    padded = Tokenizer(backend, trained.eos_token)
    assert padded.vocab_size == trained.vocab_size + 1
    assert padded.text_vocab_size == trained.text_vocab_size == trained.vocab_size
    assert max(padded.encode("<pad> some text")) < trained.vocab_size
    backend.add_tokens(["word"])
    assert Tokenizer(backend, trained.eos_token).text_vocab_size == trained.vocab_size + 2
