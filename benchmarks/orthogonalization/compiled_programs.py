"""What a compiled orthogonalization is made of: operations, instructions, bytes, and seconds."""

import dataclasses
import functools
import math
import re
import time
from typing import Any

import jax

from orthogonalization.matrix_products import product_flops
from orthogonalization.orthogonalizers import MethodName, make_orthogonalizer
from orthogonalization.shape_lists import Shape

# What XLA prints about the source: it says where the code lies, not what it does.
_METADATA = re.compile(r', metadata=\{(?:[^"}]|"[^"]*")*\}')
_SOURCE_TABLES = re.compile(r"^(FileNames|FunctionNames|FileLocations|StackFrames)\n(.+\n)*", re.M)
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = ", re.M)
_PRODUCT = re.compile(r'\bdot\(|custom_call_target="[^"]*(?:gemm|matmul|dot)[^"]*"')
_LOOP = re.compile(r"\bwhile\(")


@dataclasses.dataclass(frozen=True)
class Program:
    """One orthogonalization of a list of leaves, jitted whole."""

    compiled: Any = dataclasses.field(repr=False)
    product_flops: dict[str, float]
    """Of matrix products, loops in full, by dtype; NaN where they cannot be counted (SVD)."""
    xla_flops: float
    """By XLA's cost analysis: all operations, the body of a loop once."""
    loops: int
    trace_seconds: float
    """Tracing, and lowering to what XLA takes."""
    compile_seconds: float
    """XLA's."""
    hlo_bytes: int
    """Of the optimized program as text, without what it says about the source."""
    instructions: int
    products: int
    """Matrix products in the text, those in a loop once."""
    temporary_bytes: int
    """By XLA's memory analysis: without arguments and results."""

    @property
    def total_product_flops(self) -> float:
        """Over all dtypes."""
        return math.fsum(self.product_flops.values())

    def record(self) -> dict[str, Any]:
        """All but the executable."""
        fields = [field.name for field in dataclasses.fields(self) if field.name != "compiled"]
        return {name: getattr(self, name) for name in fields}


@functools.cache
def compile_program(
    method: MethodName, shapes: tuple[Shape, ...], dtype: str, num_steps: int | None
) -> Program:
    """Compiles a method for leaves of these shapes, once."""
    function = make_orthogonalizer(method, shapes, num_steps)
    leaves = [jax.ShapeDtypeStruct(shape, jax.numpy.dtype(dtype)) for shape in shapes]
    start = time.perf_counter()
    traced = jax.jit(function).trace(leaves)
    lowered = traced.lower()
    traced_at = time.perf_counter()
    compiled: Any = lowered.compile()
    compiled_at = time.perf_counter()
    text = without_source(compiled.as_text())
    return Program(
        compiled=compiled,
        product_flops=product_flops(traced.jaxpr),
        xla_flops=float(compiled.cost_analysis()["flops"]),
        loops=len(_LOOP.findall(text)),
        trace_seconds=traced_at - start,
        compile_seconds=compiled_at - traced_at,
        hlo_bytes=len(text.encode()),
        instructions=len(_INSTRUCTION.findall(text)),
        products=len(_PRODUCT.findall(text)),
        temporary_bytes=int(compiled.memory_analysis().temp_size_in_bytes),
    )


def without_source(hlo: str) -> str:
    """An HLO text without names of files and functions, line numbers and stack frames."""
    return _SOURCE_TABLES.sub("", _METADATA.sub("", hlo))
