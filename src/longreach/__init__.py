"""longreach: language models trained on short sequences and used on long ones."""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Public name -> module that defines it. Resolved on first use, so that `import longreach` stays cheap and
# loads none of the optional or heavy libraries.
_PUBLIC = {
    "Scaling": "longreach.positions.scaling",
    "alibi_bias": "longreach.ops.alibi",
    "alibi_slopes": "longreach.ops.alibi",
    "attention": "longreach.ops.attention",
    "convert": "longreach.pretrained.convert",
    "export_mpt": "longreach.pretrained.export",
    "extend": "longreach.pretrained.extend",
    "fixed_length": "longreach.pretrained.attend",
    "load_encoder": "longreach.encoders.load",
    "load_pretrained": "longreach.pretrained.load",
    "reach": "longreach.ops.reach",
    "register_encoders": "longreach.encoders.register",
    "restore": "longreach.pretrained.restore",
    "save_pretrained": "longreach.pretrained.save",
    "unconvert": "longreach.pretrained.convert",
    "unregister_encoders": "longreach.encoders.register",
}

if TYPE_CHECKING:  # the same for type checkers, which know of no `__getattr__` below
    from longreach.encoders.load import load_encoder
    from longreach.encoders.register import register_encoders, unregister_encoders
    from longreach.ops.alibi import alibi_bias, alibi_slopes
    from longreach.ops.attention import attention
    from longreach.ops.reach import reach
    from longreach.positions.scaling import Scaling
    from longreach.pretrained.attend import fixed_length
    from longreach.pretrained.convert import convert, unconvert
    from longreach.pretrained.export import export_mpt
    from longreach.pretrained.extend import extend
    from longreach.pretrained.load import load_pretrained
    from longreach.pretrained.restore import restore
    from longreach.pretrained.save import save_pretrained

__all__ = [
    "Scaling",
    "__version__",
    "alibi_bias",
    "alibi_slopes",
    "attention",
    "convert",
    "export_mpt",
    "extend",
    "fixed_length",
    "load_encoder",
    "load_pretrained",
    "reach",
    "register_encoders",
    "restore",
    "save_pretrained",
    "unconvert",
    "unregister_encoders",
]


if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name not in _PUBLIC:
            raise AttributeError(f"module 'longreach' has no attribute {name!r}; public names: {', '.join(__all__)}")
        value = globals()[name] = getattr(import_module(_PUBLIC[name]), name)  # found at once from now on
        return value


def __dir__() -> list[str]:
    return list(__all__)
