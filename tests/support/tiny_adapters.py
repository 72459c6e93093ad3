"""Adapters with something in every matrix, and a model to put them into."""

from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from trainer.adapters import ExpertLoraConfig, HydraLoraConfig, MoeLoraConfig, TeamLoraConfig
from trainer.adapters.layer import Experts

METHODS = {"teamlora": TeamLoraConfig, "moelora": MoeLoraConfig, "hydralora": HydraLoraConfig}
TOKENS = torch.arange(3, 27).view(2, 12)


def config_of(method: str, **options: object) -> ExpertLoraConfig:
    """k = 4, r_B = 3: no size is a multiple of 8, and A and B are told apart by their shapes."""
    return METHODS[method](**{"num_experts": 4, "expert_rank": 3, "alpha": 6.0, "task_type": "CAUSAL_LM", **options})


def make_experts(config: ExpertLoraConfig, d_in: int = 20, d_out: int = 28, dtype=torch.float32) -> Experts:
    experts = Experts(d_in, d_out, config)
    wake(experts)
    return experts.to(dtype)


@torch.no_grad()
def wake(model: nn.Module, seed: int = 0) -> None:
    """Every adapter's matrices drawn anew: experts that do something, routers that choose, an M far from identity."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, Experts):
            for name, parameter in module.named_parameters():
                scale = 0.5 if name == "interaction" else parameter.shape[-1] ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def plain_model(folder: Path, dtype: torch.dtype = torch.float32, **options: object) -> PreTrainedModel:
    """The model of a folder as plain transformers loads it; in training mode, where nothing of it is random."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).train()


def adapted(folder: Path, method: str, dtype: torch.dtype = torch.float32, **options: object) -> PeftModel:
    """That model with an adapter that does something, in fp32."""
    model = get_peft_model(plain_model(folder, dtype), config_of(method, **options))
    wake(model)
    return model


def logits(model: nn.Module) -> Tensor:
    return model(input_ids=TOKENS).logits
