"""Instances of an extended model's class, made by whoever calls it or derives from it: never half extended."""

import pickle

import pytest
import torch
import transformers
from family_models import bloom, tokens

import longreach
from longreach.pretrained.attend import extension_of

pytestmark = pytest.mark.usefixtures("without_gradients")


def alike(one, other):
    """Whether two models compute the same, one with the weights of the other."""
    one.load_state_dict(other.state_dict())
    return torch.equal(one.eval()(tokens(2, 12))[0], other.eval()(tokens(2, 12))[0])


@pytest.fixture(params=["base", "head", "classifier"])
def stock(model, request):
    if request.param == "base":
        return model.transformer
    if request.param == "classifier":
        model.config.pad_token_id = 0
        kind = getattr(transformers, type(model).__name__.replace("CausalLM", "TokenClassification"))
        return kind._from_config(model.config, attn_implementation=model.config._attn_implementation).eval()
    return model


def twin_of(stock):
    return type(stock)._from_config(stock.config, attn_implementation=stock.config._attn_implementation)


def test_called_it_gives_the_stock_class(stock, tmp_path):
    extended = longreach.extend(twin_of(stock), scaling="linear", train_length=4)
    assert isinstance(extended, type(stock))
    made = type(extended)(stock.config)
    assert type(made) is type(stock)
    assert alike(made, stock)
    stock.save_pretrained(tmp_path)
    loaded = type(extended).from_pretrained(tmp_path, attn_implementation=stock.config._attn_implementation)
    assert type(loaded) is type(stock)
    assert torch.equal(loaded.eval()(tokens(2, 12))[0], stock(tokens(2, 12))[0])
    extended.load_state_dict(stock.state_dict())
    longreach.extend(made, scaling="linear", train_length=4)
    assert torch.equal(made(tokens(2, 12))[0], extended.eval()(tokens(2, 12))[0])


def test_a_subclass_of_it_is_stock_until_it_is_extended(stock):
    expected = stock(tokens(2, 12))[0]
    extended = longreach.extend(twin_of(stock), scaling="linear", train_length=4)
    extended.load_state_dict(stock.state_dict())

    class Mine(type(extended)):
        def __init__(self, config, *, more=0):
            super().__init__(config)
            self.more = more

    mine = Mine(stock.config, more=3)
    assert (type(mine), mine.more) == (Mine, 3)
    assert alike(mine, stock)
    with pytest.raises(ValueError, match="is not extended"):
        extension_of(mine)
    longreach.extend(mine, scaling="linear", train_length=4)
    assert type(mine) is Mine
    assert torch.equal(mine(tokens(2, 12))[0], extended.eval()(tokens(2, 12))[0])
    longreach.restore(mine)
    assert type(mine) is Mine
    assert torch.equal(mine(tokens(2, 12))[0], expected)
    if isinstance(mine, transformers.GenerationMixin):
        options = {"max_new_tokens": 4, "do_sample": False}
        assert torch.equal(mine.generate(tokens(2, 6), **options), stock.generate(tokens(2, 6), **options))


def test_a_replica_runs_its_own_weights(model):
    """`torch.nn.DataParallel` copies the attributes of a module into a bare instance of its class."""
    longreach.extend(model, scaling="linear", train_length=4)
    replica = model.transformer._replicate_for_data_parallel()
    replica._modules["ln_f" if hasattr(replica, "ln_f") else "norm_f"] = torch.nn.Identity()
    assert type(replica) is type(model.transformer)
    assert not torch.allclose(replica(tokens(1, 9))[0], model.transformer(tokens(1, 9))[0])


def test_parameters_given_by_functional_call_are_those_that_count(model):
    ids = tokens(1, 20)
    longreach.extend(model, scaling="linear", train_length=8)
    halved = {name: parameter / 2 for name, parameter in model.named_parameters()}
    called = torch.func.functional_call(model, halved, (ids,)).logits
    model.load_state_dict(halved, strict=False)
    assert torch.equal(called, model(ids).logits)


class Named(transformers.BloomForCausalLM):
    """A class that pickle finds by its name."""


def test_a_user_s_class_is_kept_by_name(tmp_path):
    model = Named(bloom().config).eval()
    longreach.extend(model, scaling="linear", train_length=4)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(tokens(1, 9)).logits, model(tokens(1, 9)).logits)
    model.save_pretrained(tmp_path)
    assert transformers.AutoConfig.from_pretrained(tmp_path).architectures == ["Named"]
    assert type(longreach.restore(again)) is Named


def test_embeddings_are_resized_and_dtypes_changed_as_in_stock(model):
    longreach.extend(model, scaling="none")
    ids = tokens(1, 9)
    before = model(ids).logits
    model.resize_token_embeddings(60, mean_resizing=False)
    torch.testing.assert_close(model(ids).logits[..., :50], before)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.half().float()(ids).logits.isfinite().all()
    assert model.double()(ids).logits.dtype == torch.float64
