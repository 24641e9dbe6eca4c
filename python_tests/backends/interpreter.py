"""Triton's interpreter without what it does over and over: the same results and the same checks in half the time.

It computes one instruction of one program at a time with numpy, and most of its time goes into preparing for that.
"""

from __future__ import annotations

import functools
import inspect
import operator

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


@functools.cache
def builtins_of(package):
    """The functions of a part of the language that the interpreter puts its own in place of."""
    return [(name, member) for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]


def patch_builtin(package, builder, scope):
    """As Triton's, at every call of a function inside a kernel, but members are looked through once."""
    for name, member in builtins_of(package):
        if getattr(package, name) is member:  # and not replaced already
            interpreter._patch_attr(package, name, member, builder, scope)


def check_overflow(left, right, operation):
    """Of 32-bit integers and narrower ones; as Triton's, which takes ten instructions of the interpreter for it."""
    if left.type.scalar.int_bitwidth < 64:
        calculate = getattr(operator, operation.__name__)
        exact = calculate(left.handle.data.astype(np.int64), right.handle.data.astype(np.int64))
        type_ = left.type.scalar
        fits = type_.get_int_min_value() <= exact.min() <= exact.max() <= type_.get_int_max_value()
        assert fits, f"{type_} overflow detected for operation {operation.__name__}"


def numpy_type(original):
    """That of a scalar's or a block's numbers, from a table that Triton's function makes anew each time."""
    of_scalar = functools.cache(original)
    return lambda type_: original(type_) if type_.scalar.is_ptr() else of_scalar(type_.scalar)


def hasten() -> None:
    """Put these in place. They are Triton's private functions: one whose interpreter has none of them is left alone."""
    if hasattr(interpreter, "_patch_attr"):
        interpreter._patch_builtin = patch_builtin
    if hasattr(interpreter, "_get_np_dtype"):
        interpreter._get_np_dtype = numpy_type(interpreter._get_np_dtype)
    if hasattr(interpreter.interpreter_semantic, "binary_op_sanitize_overflow_impl"):
        interpreter.interpreter_semantic.binary_op_sanitize_overflow_impl = check_overflow
