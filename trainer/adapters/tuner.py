"""The tuners that put expert layers into a model; PEFT finds, saves, loads and switches them."""

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from trainer.adapters.adapter_config import ExpertLoraConfig
from trainer.adapters.layer import ExpertLayer, HydraLoraLayer, MoeLoraLayer, TeamLoraLayer


class ExpertLoraModel(BaseTuner):
    """What the three methods have in common: each puts its kind of layer around the linears it targets."""

    tuner_layer_cls: type[ExpertLayer]
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (the name and form are PEFT's)

    def _create_and_replace(
        self,
        config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert isinstance(config, ExpertLoraConfig)  # PEFT creates a tuner with the config it is registered with
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, config)
        elif isinstance(target, nn.Linear):
            self._replace_module(parent, target_name, self.tuner_layer_cls(target, adapter_name, config), target)
        else:
            raise ValueError(f"target_modules: {current_key} is a {type(target).__name__}, expected a linear layer")

    def _check_merge_allowed(self) -> None:
        raise ValueError("an expert adapter cannot be merged into the base: its gate depends on the token")


class TeamLoraModel(ExpertLoraModel):
    """TeamLoRA (arXiv 2408.09856)."""

    prefix = "teamlora_"
    tuner_layer_cls = TeamLoraLayer


class MoeLoraModel(ExpertLoraModel):
    """MoELoRA: TeamLoRA's function with M fixed to the identity."""

    prefix = "moelora_"
    tuner_layer_cls = MoeLoraLayer


class HydraLoraModel(ExpertLoraModel):
    """HydraLoRA: one small A, whole for every expert."""

    prefix = "hydralora_"
    tuner_layer_cls = HydraLoraLayer
