"""The counter of programs counts what it says, and what it compares with does the same."""

import os
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import pytest

from counting.by_hand import step_by_hand
from counting.collectives import read_traffic
from counting.problems import make_problem
from counting.settings import Counts
from matrix_products import product_flops

HLO = """HloModule jit_f, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}
%body (carry: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %sum.1 = f32[4,8]{1,0} all-reduce(%x.1), replica_groups=[2,4]<=[8], to_apply=%add
}
ENTRY %main (p0: f32[4,8]) -> f32[4,8] {
  %p0 = f32[4,8]{1,0} parameter(0), metadata={op_name="an all-reduce(not one)"}
  %turned = (f32[1,2]{1,0}, f32[1,2]{1,0}, /*index=2*/f32[1,2]{1,0}) all-to-all(%a, %b, %c), \
replica_groups={{0,1,2},{3,4,5}}
  %five = (s32[], f32[4,8]{1,0}) while(%p0), condition=%add, body=%body, \
backend_config={"known_trip_count":{"n":"5"},"known_init_step":{"init":"0","step":"1"}}
  %moved = f32[2]{0} collective-permute(%p), source_target_pairs={{0,1}}
  %whole = f32[8]{0} all-gather(%q), replica_groups=mesh['a'=2,'b'=4], \
device_ids=([4,2]T(1,0)) {'a','b':(2)2}, dimensions={0}
  %part = bf16[3]{0} reduce-scatter(%r), replica_groups={}, to_apply=%add
  %alone = f32[8]{0} all-reduce(%s), replica_groups={{0},{1}}, to_apply=%add
}
"""


def test_collectives_are_read_from_a_program():
    numbers, received = read_traffic(HLO, num_devices=8)
    once = dict.fromkeys(("all-to-all", "collective-permute", "all-gather", "reduce-scatter"), 1)
    assert numbers == once | {"all-reduce": 5}
    every_turn = 5 * 2 * (4 * 8 * 4) * 3 / 4
    assert received == 3 * 8 * 2 / 3 + every_turn + 8 + 32 * 3 / 4 + 6 * 7


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("%x = f32[8]{0} all-gather(%y), replica_groups=?", "groups of devices cannot be read"),
        ("%x = f32[8]{0} all-gather-start(%y), replica_groups={}", "Asynchronous"),
        ("%x = f32[4,8]{1,0} while(%y), condition=%add, body=%body", "no known length"),
    ],
)
def test_programs_whose_collectives_cannot_be_counted_are_refused(line, message):
    others = HLO[: HLO.index("ENTRY")]
    with pytest.raises(ValueError, match=message):
        read_traffic(f"{others}ENTRY %main (y: f32[1]) -> f32[8] {{\n  {line}\n}}\n", 8)


def test_matrix_products_count_at_every_turn_of_a_loop():
    matrix = jnp.ones((2, 3))

    @jax.jit
    def function(x, depth):
        x = jax.lax.fori_loop(0, 4, lambda _, x: x @ matrix @ matrix.T, x)
        x, _ = jax.lax.scan(lambda x, _: (x @ matrix @ matrix.T, None), x, length=5)
        x = jax.lax.fori_loop(depth, 7, lambda _, x: x @ matrix @ matrix.T, x)
        return jax.lax.cond(depth > 2, lambda x: x @ matrix, lambda x: jnp.zeros((8, 3)), x)

    product = 2 * 8 * 2 * 3
    for depth, turns in ((jnp.int32(2), 5), (jnp.int32(4), 3)):
        arguments = jnp.ones((8, 2)), depth
        flops = product_flops(function.trace(*arguments), arguments)
        assert flops == {"float32": product * (2 * (4 + 5 + turns) + (depth > 2))}


@pytest.mark.parametrize(
    ("network", "depth"), [("mlp", 1), pytest.param("gpt", 2, marks=pytest.mark.deep)]
)
def test_the_one_call_trains_and_costs_what_the_step_by_hand_does(network, depth):
    sizes: dict = {"batch_size": 4, "widths": (16,), "width": 8, "blocks": 2}
    problem = make_problem(network, Counts(output_dir=Path(), **sizes))
    programs = problem.steps(depth, {})[0], step_by_hand(problem, depth, {})
    if "xla_cpu_use_fusion_emitters=false" in os.environ.get("XLA_FLAGS", ""):
        # Those make a loop of a scatter, of which nothing is counted.
        for program in programs:
            options = {"xla_cpu_use_fusion_emitters": True}
            program.compiled = program._traced.lower().compile(options)
    ours, by_hand = (program.count() for program in programs)
    assert ours["matmul_flops"] == by_hand["matmul_flops"]
    if network == "mlp":
        for cost in ("flops", "temporary_bytes", "bytes_accessed"):
            assert ours[cost] == pytest.approx(by_hand[cost], rel=0.02)
    for program in programs * 3:
        program.run()
    params, trained = (program.kept[0] for program in programs)
    params = {name: params[name] for name in trained}
    if network == "gpt":
        params["blocks"] = jax.tree.map(lambda leaf: leaf[depth - 1 :], params["blocks"])
        for tree in (params, trained):
            # Softmax does not see what is added to every key: Adam scales rounding to full size.
            del tree["blocks"]["attention"]["key"]["bias"]
    chex.assert_trees_all_close(params, trained, atol=1e-4)  # a step moves a parameter by some 1e-3
