"""Folds an adapter with constant gates into one plain LoRA, and writes it in PEFT's format.

With constant omega, TeamLoRA's scale * sum_i omega_i B_i A_i x (section 3) equals B A x: A stacks the slices A_i, and B
concatenates the B_i, each times scale * omega_i. Its rank is r_A = k r_B. The same holds for MoELoRA. HydraLoRA's
experts share one A of rank r_B, so their weighted B_i are summed, and the rank is r_B.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from data_prep.user_error import UserError
from trainer.adapters.adapter_folder import drop_default_keys
from trainer.adapters.layer import Experts
from trainer.base.safetensors_writer import write_tensors
from trainer.export.mean_gates import adapted_by_experts

SELECTORS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


@dataclass(frozen=True)
class LowRank:
    """The update b @ a of one linear's weight. a [r, d_in], b [d_out, r], fp32 on the CPU; b includes the scale."""

    a: Tensor
    b: Tensor

    def update(self) -> Tensor:
        """[d_out, d_in]"""
        return self.b @ self.a


@torch.no_grad()
def low_rank_updates(model: PeftModel, gates: dict[str, Tensor]) -> dict[str, LowRank]:
    """Updates by the adapted linear's name in the base model. gates: {} for a run of method lora.

    Raises UserError if the adapter changes more than linear weights (training can start from another tool's adapter).
    """
    config = model.peft_config["default"]
    trains_modules, trains_magnitudes = (getattr(config, key, None) for key in ("modules_to_save", "use_dora"))
    if trains_modules or trains_magnitudes or getattr(config, "bias", "none") != "none":
        raise UserError(
            f"--to: the adapter trains modules_to_save, biases or magnitudes ({config.base_model_name_or_path}), which "
            "a low-rank update cannot hold; export it with --to peft"
        )
    experts = {name: fold(module, gates[name]) for name, module in adapted_by_experts(model).items()}
    return experts or {
        name: LowRank(
            module.lora_A["default"].get_parameter("weight").float().cpu(),
            module.lora_B["default"].get_parameter("weight").float().cpu() * module.scaling["default"],
        )
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, LoraLayer)
    }


def fold(experts: Experts, omega: Tensor) -> LowRank:
    """The update of one adapted linear with constant gates omega [k]."""
    weighted = experts.experts.float().cpu() * (experts.gate.scale * omega).view(-1, 1, 1)  # [k, r_B, d_out]
    b = weighted.sum(0) if experts.gate.heads == 1 else weighted.flatten(0, 1)
    return LowRank(experts.lora_a.float().cpu(), b.t().contiguous())


def write_lora(folder: Path, updates: dict[str, LowRank], adapter: PeftConfig) -> None:
    """Writes adapter_config.json and adapter_model.safetensors (fp32) for plain PEFT. lora_alpha = r: the scale is 1.

    adapter: the configuration of the run's own adapter, which selects the linears.
    """
    rank = len(next(iter(updates.values())).a)
    LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        task_type=adapter.task_type,
        base_model_name_or_path=adapter.base_model_name_or_path,
        inference_mode=True,
        **{key: getattr(adapter, key) for key in SELECTORS},
    ).save_pretrained(str(folder))
    drop_default_keys(folder)
    tensors = {}
    for name, update in updates.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = update.a.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = update.b
    write_tensors(tensors, folder / SAFETENSORS_WEIGHTS_NAME)
