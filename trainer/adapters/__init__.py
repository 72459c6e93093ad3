"""TeamLoRA, MoELoRA and HydraLoRA as PEFT methods. Importing this package registers them with PEFT.

From then on `peft.get_peft_model` and `peft.PeftModel.from_pretrained` know them like PEFT's own. Needs torch and
peft only.
"""

from peft.utils import PeftType, register_peft_method

from trainer.adapters.adapter_config import ExpertLoraConfig, HydraLoraConfig, MoeLoraConfig, TeamLoraConfig
from trainer.adapters.tuner import HydraLoraModel, MoeLoraModel, TeamLoraModel

__all__ = ["ExpertLoraConfig", "HydraLoraConfig", "MoeLoraConfig", "TeamLoraConfig"]


def _add_to_peft_types(name: str) -> None:
    """Makes PeftType(name) a member: PEFT's registration asks for one, and its enumeration is closed."""
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)


def _register() -> None:
    methods = {
        "teamlora": (TeamLoraConfig, TeamLoraModel),
        "moelora": (MoeLoraConfig, MoeLoraModel),
        "hydralora": (HydraLoraConfig, HydraLoraModel),
    }
    for name, (config, model) in methods.items():
        _add_to_peft_types(name.upper())
        register_peft_method(name=name, config_cls=config, model_cls=model)


_register()
