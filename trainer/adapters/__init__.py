"""TeamLoRA, MoELoRA and HydraLoRA as PEFT methods. Importing this package registers them with PEFT.

From then on `peft.get_peft_model` and `peft.PeftModel.from_pretrained` support them like PEFT's own methods. Needs
torch, peft and pydantic only.
"""

from peft.utils import PeftType, register_peft_method

from trainer.adapters.adapter_config import ExpertLoraConfig, HydraLoraConfig, MoeLoraConfig, TeamLoraConfig
from trainer.adapters.tuner import ExpertLoraModel, HydraLoraModel, MoeLoraModel, TeamLoraModel

__all__ = ["EXPERT_METHODS", "ExpertLoraConfig", "HydraLoraConfig", "MoeLoraConfig", "TeamLoraConfig"]

EXPERT_METHODS: dict[str, tuple[type[ExpertLoraConfig], type[ExpertLoraModel]]] = {
    "teamlora": (TeamLoraConfig, TeamLoraModel),
    "moelora": (MoeLoraConfig, MoeLoraModel),
    "hydralora": (HydraLoraConfig, HydraLoraModel),
}


def _add_to_peft_types(name: str) -> None:
    """Adds the member PeftType(name), which PEFT's registration requires although the enumeration is closed."""
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)


def _register() -> None:
    for name, (config, model) in EXPERT_METHODS.items():
        _add_to_peft_types(name.upper())
        register_peft_method(name=name, config_cls=config, model_cls=model)


_register()
