"""ONNX: one graph for any length, run by onnxruntime."""

import onnx
import onnxruntime
import pytest
import torch
from published import Published, write

import longreach


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
@torch.no_grad()
def test_a_graph_of_any_length_equals_the_model(tmp_path):
    model = longreach.load_encoder(write(Published("jina", layers=1, heads=6), tmp_path / "model"))
    names, path = ("input_ids", "attention_mask"), tmp_path / "model.onnx"
    batch, length = torch.export.Dim("batch", min=1, max=512), torch.export.Dim("length", min=1, max=65536)
    example = torch.full((2, 9), 7)
    torch.onnx.export(
        model,
        (example, torch.ones_like(example)),
        path,
        dynamic_shapes={name: {0: batch, 1: length} for name in names},
        verbose=False,
    )
    graph = onnx.load(path)
    weights = sum(x.numel() for x in model.parameters())
    held = sum(onnx.numpy_helper.to_array(tensor).size for tensor in graph.graph.initializer)
    assert held <= weights + 100  # no table
    session = onnxruntime.InferenceSession(path)
    assert [put.name for put in session.get_inputs()] == list(names)
    for rows, tokens in ((1, 1), (2, 9), (3, 200)):
        ids = torch.randint(5, 28, (rows, tokens), generator=torch.Generator().manual_seed(tokens))
        mask = torch.ones_like(ids)
        mask[-1, 1 + tokens // 2 :] = 0
        mask[: rows // 2, : tokens // 3] = 0  # at the left too
        hidden, pooled = session.run(None, dict(zip(names, (ids.numpy(), mask.numpy()), strict=True)))
        right = model(ids, mask)
        torch.testing.assert_close(torch.from_numpy(hidden), right.last_hidden_state, rtol=0, atol=1e-5)
        torch.testing.assert_close(torch.from_numpy(pooled), right.pooler_output, rtol=0, atol=1e-5)


def test_slopes_that_depend_on_length_have_no_such_graph(jina):
    model = longreach.load_encoder(jina, scaling="linear")
    with pytest.raises(Exception, match='scaling="linear" depends on length: export with "none"'):
        torch.export.export(model, (torch.full((2, 9), 7),))
