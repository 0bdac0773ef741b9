"""The position methods and shapes of decoder that the tests of models go through."""

METHODS = (
    "alibi",
    "alibi:scaling=linear-fixed=2",
    "alibi:learned=true",
    "alibi:slopes=random:exponent=4",
    "fire:width=8:threshold=6",
    "kerple",
    "kerple:kernel=power",
    "learned:table_length=64",
    "none",
    "rotary",
    "rotary:base=500:scaling=linear-fixed=2",
    "rotary:base=500:scaling=yarn-fixed=2",
    "sandwich:dimension=16",
    "sinusoidal",
    "sinusoidal-shifted",
    "t5:num_buckets=6:max_distance=12",
    "xpos:unit=16",
)
"""Methods that do not look at the length of the whole sequence."""

STRETCHED = (
    "alibi:scaling=linear",
    "alibi:scaling=linear:learned=true",
    "alibi:scaling=ntk",
    "alibi:scaling=none+logn",
    "rotary:scaling=linear",
    "rotary:scaling=ntk",
    "rotary:scaling=yarn",
)
"""Methods that do, past the training length."""

DYNAMIC = (*STRETCHED, "rotary-randomized:range=64")
"""All that look at it."""

ARCHITECTURES = {
    "mpt": {},
    "llama": {"norm": "rmsnorm", "activation": "swiglu", "num_kv_heads": 2, "tied_embeddings": False},
    "biases, one key head": {"bias": True, "num_kv_heads": 1, "d_ff": 24},
}
