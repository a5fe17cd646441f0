"""How many floating-point operations matrix products take, and how fast this machine does them."""

import collections
import functools
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from orthogonalization.shape_lists import Shape, matrix_shape


def product_flops(jaxpr: Any) -> dict[str, float]:
    """FLOPs of the matrix products of a traced function, by the dtype of their factors.

    XLA's cost analysis counts the body of a loop once, however often it runs. This counts a scan
    (and with it `lax.map` and a `fori_loop` of known length) as often as it runs, of a conditional
    the most expensive branch, and of what depends on the platform the branch of this one. It counts
    what is written down: no element-wise operation, and nothing of what a compiler adds or saves.
    NaN where the number is not known: products in a `while_loop` or in a kernel of one's own, and
    those of an SVD.
    """
    total: dict[str, float] = collections.defaultdict(float)
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "dot_general":
            factor = equation.invars[0].aval
            (contracted, _), _ = parameters["dimension_numbers"]
            size = math.prod(factor.shape[axis] for axis in contracted)
            output = math.prod(equation.outvars[0].aval.shape)
            total[str(factor.dtype)] += 2 * size * output
            continue
        if name == "svd":
            total[str(equation.invars[0].aval.dtype)] = math.nan
        inner = [product_flops(sub) for sub in _inner_jaxprs(parameters)]
        if name == "cond":
            inner = [_branch(inner, parameters.get("branches_platforms"))]
        times = {"scan": parameters.get("length"), "while": math.nan, "pallas_call": math.nan}
        for flops in inner:
            for dtype, count in flops.items():
                total[dtype] += count * times.get(name, 1)
    return dict(total)


def _branch(
    branches: list[dict[str, float]], platforms: Sequence[tuple[str, ...] | None] | None
) -> dict[str, float]:
    if platforms is None:
        return max(branches, key=lambda flops: sum(flops.values()))
    own = {"gpu": {"gpu", "cuda", "rocm"}}.get(jax.default_backend(), {jax.default_backend()})
    taken = (names is None or bool(own.intersection(names)) for names in platforms)
    return branches[list(taken).index(True)]


def _inner_jaxprs(parameters: dict[str, Any]) -> Iterator[Any]:
    for value in parameters.values():
        for item in value if isinstance(value, list | tuple) else (value,):
            jaxpr = getattr(item, "jaxpr", item)  # without its constants
            if hasattr(jaxpr, "eqns"):
                yield jaxpr


def necessary_flops(shapes: Sequence[Shape], num_steps: int) -> int:
    """FLOPs of the products without which quintic steps cannot be taken, summed over the leaves.

    For n × m, n ≤ m, the cheaper form of two. Plain, each step: XXᵀ, its square, and their sum
    times X. Gram: R = XXᵀ; each step Z = bR + cR², Q ← Q(aI + Z), R ← (aI + Z)R(aI + Z), where the
    first Q is free and the last R not needed; at the end QX. Products are counted in full, also
    symmetric ones, of which half would do; a kernel that uses that can stay below.
    """
    total = 0
    for shape in shapes:
        n, m = sorted(matrix_shape(shape))
        large, small = 2 * n * n * m, 2 * n**3
        small_products = 4 * num_steps - 3 if num_steps > 1 else 1
        plain = num_steps * (2 * large + small)
        total += min(plain, 2 * large + small_products * small)
    return total


class ProductRates:
    """The rate of large square matrix products, measured anew whenever it is asked for.

    Other programs on the machine come and go, so that one product tells little about a call that
    takes seconds: the rate is sustained for some time.
    """

    def __init__(self, sizes: Sequence[int]):
        self._sizes = sizes
        self._products: dict[tuple[str, int], tuple[Any, jax.Array]] = {}

    def measure(self, dtype: str, seconds: float) -> float:
        """FLOPs a second, of the best size.

        Args:
            dtype: Of the factors.
            seconds: For all sizes together; each is multiplied at least once.
        """
        return max(self._sustained(dtype, size, seconds / len(self._sizes)) for size in self._sizes)

    def _sustained(self, dtype: str, size: int, seconds: float) -> float:
        product, x = self._product(dtype, size)
        count, start, elapsed = 0, time.perf_counter(), 0.0
        while count == 0 or elapsed < seconds:
            jax.block_until_ready(product(x, x))
            count, elapsed = count + 1, time.perf_counter() - start
        return count * 2 * size**3 / elapsed

    def _product(self, dtype: str, size: int) -> tuple[Any, jax.Array]:
        """Compiled and warmed up."""
        if (dtype, size) not in self._products:
            generator = np.random.default_rng(0)
            x = jnp.asarray(generator.standard_normal((size, size), np.float32), dtype)
            # Sums in float32: on a CPU with bfloat16 instructions twice as fast as to bfloat16.
            product = jax.jit(functools.partial(jnp.dot, preferred_element_type=jnp.float32))
            jax.block_until_ready(product(x, x))
            self._products[dtype, size] = product, x
        return self._products[dtype, size]
