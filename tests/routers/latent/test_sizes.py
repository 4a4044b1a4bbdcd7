from __future__ import annotations

import pytest

from routers.latent.sizes import interaction_parameters, width_for


def test_parameters_are_those_of_the_layers():
    pytest.importorskip("torch")
    from experts.latent.interaction import Interaction

    layer = Interaction({"a": 48, "b": 32}, 24, 4)
    every = sum(p.numel() for p in layer.parameters())
    sizes = {"width": 24, "n_heads": 4, "n_stacks": 2}
    assert interaction_parameters({"a": 48, "b": 32}, ["a", "b"], **sizes) == every
    # A peer that never writes needs no way back.
    assert interaction_parameters({"a": 48, "b": 32}, ["a"], **sizes) == every - 24 * 32 - 1
    assert interaction_parameters({"a": 48}, ["a"], width=24, n_heads=4, n_stacks=4) == 3 * (
        interaction_parameters({"a": 48}, ["a"], **sizes)
    )


@pytest.mark.parametrize("peers", [1, 2, 3])
@pytest.mark.parametrize("n_stacks", [2, 4])
@pytest.mark.parametrize("size", [576, 640, 2048])
def test_width_without_peers_gives_as_many_parameters(peers, n_stacks, size):
    widths = {"writer": size, **{f"peer{number}": size for number in range(peers)}}
    wanted = interaction_parameters(widths, ["writer"], width=256, n_heads=8, n_stacks=n_stacks)
    width, n_heads = width_for(wanted, size, n_heads=8, n_stacks=n_stacks)
    assert width % n_heads == 0
    found = interaction_parameters(
        {"writer": size}, ["writer"], width=width, n_heads=n_heads, n_stacks=n_stacks
    )
    assert abs(found / wanted - 1) <= 0.01
    assert width > 256


def test_too_few_parameters_are_refused():
    with pytest.raises(ValueError, match="no width"):
        width_for(10, 576, n_heads=8, n_stacks=2)
    with pytest.raises(ValueError, match="no width"):
        width_for(1000, 576, n_heads=8, n_stacks=1)
