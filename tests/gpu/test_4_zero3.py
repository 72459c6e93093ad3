"""ZeRO-3 on one rank, with and without offload, trains as the same run without it."""

import pytest


@pytest.fixture(scope="module")
def unsharded(eight_layers):
    return eight_layers.train("unsharded")


@pytest.mark.parametrize("config", ["zero3", "zero3_offload"])
def test_losses_are_those_of_the_run_without_sharding(eight_layers, unsharded, config, figures):
    found = eight_layers.train(config, f"deepspeed.config={config}")
    figures[f"{config}: tokens per second over single"] = round(
        found[-1]["tokens_per_second"] / unsharded[-1]["tokens_per_second"], 3
    )
    # bf16: gradients are summed in another order
    assert [r["loss"] for r in found] == pytest.approx([r["loss"] for r in unsharded], rel=5e-3)
