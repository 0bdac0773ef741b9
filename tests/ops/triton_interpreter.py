"""Importing this module makes the Triton kernels runnable in the tests: compiled on a GPU, interpreted without one.

Triton reads TRITON_INTERPRET when it is imported and when a kernel is defined, so import this first. It is the one
place that mends what the interpreter of Triton 3.6 gets wrong, none of which touches the kernels:

- a scalar is an array of one element, which NumPy from 2.4 refuses to turn into an index;
- a product of bfloat16 matrices multiplies their bit patterns as integers;
- float32 is cut off to bfloat16 instead of rounded to the nearest even, as GPUs do;
- products are NumPy's: the plain way, which the rule for errors compares with, has PyTorch's, of other rounding;
- each call of a function by a kernel puts the interpreter's language in place anew, a third of the time it takes.
"""

import os
import sys
from typing import Any

import pytest
import torch


def swept(cases: dict[Any, Any], *quick: Any) -> list[Any]:
    """Cases by name as parameters of a test, of which `quick` ones run always, the others in the interpreted sweep."""
    return [
        pytest.param(case, id=str(name), marks=() if name in quick else pytest.mark.interpreted)
        for name, case in cases.items()
    ]


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if DEVICE == "cpu":
    if "longreach.ops.triton.launch" in sys.modules or (
        "triton" in sys.modules and "TRITON_INTERPRET" not in os.environ
    ):
        raise RuntimeError("triton was imported before its interpreter was asked for: import triton_interpreter first")
    os.environ["TRITON_INTERPRET"] = "1"

    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert_float = interpreter._convert_float
    patch_language = interpreter._patch_lang
    patch_tensor = interpreter._patch_lang_tensor
    patched: set[int] = set()  # the modules of the kernel that runs and of the functions that it has called

    def rounding_convert_float(data: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if source == tl.bfloat16 and target == tl.float32:
            return data.astype(np.uint32) << 16
        if source == tl.float32 and target == tl.bfloat16:
            return torch.from_numpy(data.copy()).to(torch.bfloat16).view(torch.uint16).numpy()
        return convert_float(data, source, target, rounding_mode)

    def dot(builder: Any, a: Any, b: Any, accumulator: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        operands = []
        for operand in (a, b):
            data = operand.data
            if operand.dtype == tl.bfloat16:
                data = rounding_convert_float(data, tl.bfloat16, tl.float32, None).view(np.float32)
            operands.append(torch.from_numpy(data.astype(accumulator.data.dtype)))
        product = torch.matmul(*operands).numpy()
        return interpreter.TensorHandle(product + accumulator.data, accumulator.dtype.scalar)

    def patch_tensor_with_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def patch_language_once(function: Any) -> Any:
        module = id(function.__globals__)
        if module in patched:
            return None  # what a function gets is never asked to restore anything
        launched = not patched
        patched.add(module)
        scope = patch_language(function)
        if launched:
            restore = scope.restore
            scope.restore = lambda: (patched.clear(), restore())
        return scope

    interpreter._convert_float = rounding_convert_float
    interpreter._patch_lang = patch_language_once
    interpreter._patch_lang_tensor = patch_tensor_with_index
    interpreter.InterpreterBuilder.create_dot = dot
