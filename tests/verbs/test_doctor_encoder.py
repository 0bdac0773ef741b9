import io
import json

import pytest
from published import Published, write
from rich.console import Console

from longreach.cli import main
from longreach.verbs.doctor import DoctorConfig
from longreach.verbs.doctor_encoder import examine, print_checkup
from longreach.verbs.open import is_encoder


def page(checkup, width=100):
    out = io.StringIO()
    print_checkup(checkup, Console(file=out, width=width))
    return " ".join(out.getvalue().split())


def published(folder, layout, *, left_out=(), **changes):
    model = Published(layout, layers=2, **changes)
    write(model, folder)
    kept = {key: value for key, value in model.config().items() if key not in left_out}
    (folder / "config.json").write_text(json.dumps(kept))
    return str(folder)


def test_it_tells_what_stock_loading_leaves_random_and_how_far_heads_see(tmp_path, corpus):
    folder = published(tmp_path / "jina", "jina", left_out=("attn_implementation",))
    text = str(corpus / "00.txt")
    checkup = examine(DoctorConfig(folder, text=text, valid_lengths=(200,)))
    assert "encoder.layer.*.intermediate.dense.weight" in checkup.stock.left_random
    assert "embeddings.position_embeddings.weight" in checkup.stock.left_random
    assert set(checkup.stock.unread) >= {"encoder.layer.*.mlp.gated_layers.weight", "encoder.layer.*.mlp.wo.weight"}
    assert 0 < checkup.stock.random_share < 1
    steepest = max(checkup.heads, key=lambda head: head.slope)
    shallowest = min(checkup.heads, key=lambda head: head.slope)
    assert max(steepest.tokens) < 200
    assert set(shallowest.tokens) == {200}
    shown = page(checkup)
    assert "jina layout, 12 heads, 2 layers, float32; its own code keeps 2 MiB of biases for 200 tokens" in shown
    assert "loads a BERT without a word of which" in shown
    assert f"At 200 tokens, on {text}, over 2 layers" in shown
    assert "longreach.load_encoder" in shown


@pytest.mark.parametrize(
    ("layout", "left_out", "said"),
    [
        ("jina", (), 'refuses it: Specified `attn_implementation="torch"` is not supported'),
        ("mosaic", (), "refuses it: The repository"),
        ("mosaic", ("auto_map",), "refuses it: Unrecognized model"),
    ],
)
def test_it_tells_what_stock_loading_refuses(layout, left_out, said, tmp_path):
    folder = published(tmp_path / "model", layout, left_out=left_out)
    assert said in page(examine(DoctorConfig(folder, valid_lengths=(64,))))


def test_doctor_tells_encoders_from_decoders(tmp_path, capsys):
    folder = published(tmp_path / "model", "original", heads=4)
    assert is_encoder(folder)
    assert not is_encoder(str(tmp_path))
    main(["doctor", folder, "--valid-lengths", "64"])
    assert "original layout, 4 heads" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "float3"}, "^dtype='float3'"),
        ({"valid_lengths": (10_000,)}, "tokens, the lengths need 10,000"),
        ({"valid_lengths": (16, 32)}, "^valid_lengths=16,32: an encoder is examined at one length"),
        ({"max_memory": 1.0}, "^max_memory=1.0: it is for decoders"),
        ({"trust_remote_code": True}, "^trust_remote_code=True: it is for decoders"),
        ({"train_length": 512}, "^train_length=512: no slopes are scaled by length here"),
    ],
)
def test_what_cannot_be_done_is_named(options, said, tmp_path, corpus):
    folder = published(tmp_path / "model", "jina")
    with pytest.raises(ValueError, match=said):
        examine(DoctorConfig(folder, text=str(corpus / "00.txt"), **options))
