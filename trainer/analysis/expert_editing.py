"""Lists the experts of a finished run, and writes its adapter with experts dropped or added.

Kept experts compute what they did before. The router therefore keeps all its rows: each softmax output depends on all
of them. Only M changes, to [k', k]: a kept expert keeps its row, and a new one gets its own row over the old router's
outputs. alpha is rescaled, since the update is scaled by k.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor, nn

import trainer.adapters  # noqa: F401 (registers our methods with PEFT)
from data_prep.publish import blame_option, publish_atomically
from data_prep.tables import text_table
from data_prep.user_error import UserError
from trainer.adapters.adapter_config import ExpertLoraConfig, TeamLoraConfig
from trainer.adapters.adapter_folder import check_adapter_folder
from trainer.base.safetensors_writer import write_tensors
from trainer.run import run_dir
from trainer.telemetry.metrics import read_records


def list_experts(run: Path) -> str:
    """A table of each expert's mean router weight at the last step that measured it."""
    config = _config(run)
    weights = _last_weights(run)
    measured = len(weights) == config.num_experts
    cells = [f"{weight:.4f}" for weight in weights] if measured else ["not measured"] * config.num_experts
    return text_table(["expert", "mean weight"], [[str(i), cell] for i, cell in enumerate(cells)], left=())


def change_experts(run: Path, keep: list[int] | None, add: int, to: Path | None) -> str:
    """Writes the run's adapter with the experts `keep` (None: all) and `add` new ones. Returns how to train from it.

    Raises UserError if the adapter does not allow that, or the folder exists.
    """
    config = _config(run)
    if not isinstance(config, TeamLoraConfig):
        raise UserError(
            f"{run}: its experts cannot be changed: only teamlora has the interaction matrix that keeps the other "
            "experts' weights; give a run of teamlora"
        )
    if config.renormalize:
        raise UserError(
            f"{run}: adapter.renormalize=true makes every expert's weight depend on all others, so experts cannot be "
            "changed; train with adapter.renormalize=false to change them"
        )
    k = config.num_experts
    keep = list(range(k)) if keep is None else keep
    if keep[-1] >= k:
        raise UserError(f"--keep: there is no expert {keep[-1]}; {run} has 0 to {k - 1}")
    target = to or run / f"{run_dir.ADAPTER}-{len(keep) + add}experts"
    if target.exists():
        raise UserError(f"--to: {target} exists; give another folder or remove it")
    source = run / run_dir.ADAPTER
    torch.manual_seed(len(keep) + add)
    tensors = {
        name: _changed(name, tensor, config, keep, add)
        for name, tensor in sorted(load_file(source / SAFETENSORS_WEIGHTS_NAME).items())
    }
    config.num_router_outputs = config.num_router_outputs or k
    config.num_experts = len(keep) + add
    config.alpha *= k / config.num_experts
    _write(source, target, config, tensors)
    return (
        f"{target}: {config.num_experts} experts\n"
        f"train from it with adapter.init_from={target} adapter.num_experts={config.num_experts} "
        f"adapter.expert_rank={config.expert_rank} adapter.alpha={config.alpha!r}"
    )


def _changed(name: str, tensor: Tensor, config: TeamLoraConfig, keep: list[int], add: int) -> Tensor:
    """One parameter for the experts `keep` and `add` new ones."""
    kind = name.rpartition(".")[2]
    if kind == "experts":  # [k, r_B, d_out]
        return torch.cat([tensor[keep], tensor.new_zeros(add, *tensor.shape[1:])])
    if kind == "lora_a":  # [k r_B, d_in]
        slices = tensor.unflatten(0, (config.num_experts, config.expert_rank))
        new = torch.empty(add, *slices.shape[1:])
        if add:
            nn.init.kaiming_uniform_(new.flatten(0, 1), a=5**0.5)
        return torch.cat([slices[keep], new.to(tensor.dtype)]).flatten(0, 1)
    if kind == "interaction":  # [k, router outputs]: a new row starts near the mean of the router outputs
        new = 1 / tensor.shape[1] + torch.empty(add, tensor.shape[1]).uniform_(-0.1, 0.1)
        return torch.cat([tensor[keep], new.to(tensor.dtype)])
    return tensor


def _write(source: Path, target: Path, config: ExpertLoraConfig, tensors: dict[str, Tensor]) -> None:
    """Published by one rename, with all other files of the adapter folder."""
    with blame_option("--to", target), publish_atomically(target) as staging:
        shutil.copytree(source, staging, dirs_exist_ok=True)
        write_tensors(tensors, staging / SAFETENSORS_WEIGHTS_NAME)
        config.save_pretrained(str(staging))


def _config(run: Path) -> ExpertLoraConfig:
    run_dir.open_run(run)
    config, _ = check_adapter_folder(run / run_dir.ADAPTER)
    if not isinstance(config, ExpertLoraConfig):
        raise UserError(
            f"{run}: its adapter is a {config.peft_type.value}, which has no experts; give a run of teamlora, moelora "
            "or hydralora"
        )
    return config


def _last_weights(run: Path) -> list[float]:
    measured = (record["router_weight"] for record in reversed(read_records(run)) if "router_weight" in record)
    weights: Any = next(measured, [])
    return weights if isinstance(weights, list) and all(isinstance(weight, float) for weight in weights) else []
