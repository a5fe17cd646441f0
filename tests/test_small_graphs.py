"""The small graphs: their values, and the same steps however many are one program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from graphs.in_jax import Training, graph_loss
from graphs.problems import make_problem

GPT = pytest.param("gpt", 2, marks=pytest.mark.deep)


@pytest.mark.parametrize(
    ("graph", "value", "of_a", "of_b"),
    [("tiny", 612.5, -35.0, 1050.0), ("small", 24.7041, 138.8338, 645.5773)],
)
def test_graphs_of_scalars_have_the_values_and_derivatives_that_were_published(
    graph, value, of_a, of_b
):
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, make_problem(graph, 0, 1, 1).params)
        found, grads = jax.value_and_grad(graph_loss(graph))(params, None, None)
    np.testing.assert_allclose([found, grads["a"], grads["b"]], [value, of_a, of_b], atol=5e-5)


def test_the_gpt_has_the_published_number_of_parameters():
    assert sum(x.size for x in make_problem("gpt", 0, 1, 1).params.values()) == 46_337


@pytest.mark.parametrize(("graph", "batch"), [("mlp", 1), ("mlp", 3), GPT])
def test_many_steps_in_one_program_are_those_steps(graph, batch):
    problem = make_problem(graph, 5, batch, 4)
    one_by_one, at_once = (Training(graph, problem, n) for n in (1, 4))
    losses = [one_by_one.run(4)["loss"], at_once.run(4)["loss"]]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    for name, array in one_by_one.params.items():
        np.testing.assert_allclose(array, at_once.params[name], rtol=1e-4, atol=1e-6)
        assert (array != problem.params[name]).any()
