"""DeepSpeed files as people bring them: read as DeepSpeed would, or refused in one line that names the key."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import BaseModel

from data_prep.user_error import UserError
from trainer.distributed import deepspeed_sections
from trainer.distributed.deepspeed_file import read_deepspeed_file
from trainer.distributed.deepspeed_sections import DeepSpeedFile

REPOSITORY = Path(__file__).parent.parent.parent
SHIPPED = [*sorted((REPOSITORY / "ds_configs").glob("*.json")), REPOSITORY / "tests" / "golden" / "zero3.json"]


@pytest.fixture
def read(tmp_path) -> Callable[..., dict[str, Any]]:
    """Reads a file with that zero_optimization, of stage 3 where it does not say, and more keys."""

    def read(zero: Any = None, **more: Any) -> dict[str, Any]:
        section = {"stage": 3, **(zero or {})} if zero is None or isinstance(zero, dict) else zero
        (tmp_path / "own.json").write_text(json.dumps({"zero_optimization": section, **more}))
        return read_deepspeed_file(tmp_path / "own.json")

    return read


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_file_says_what_it_says(path):
    given = json.loads(path.read_text())
    expected = {key: value for key, value in given.items() if value != "auto"}
    assert read_deepspeed_file(path) == {**expected, "bf16": {}}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"stage": "3"}, {"stage": 3}),
        ({"stage": 2, "overlap_comm": "true"}, {"stage": 2, "overlap_comm": True}),
        ({"stage": 3, "reduce_bucket_size": "50000000"}, {"stage": 3, "reduce_bucket_size": 50_000_000}),
        ({"stage": 3, "reduce_bucket_size": 5e7}, {"stage": 3, "reduce_bucket_size": 50_000_000}),
        ({"stage": 3, "stage3_prefetch_bucket_size": "auto"}, {"stage": 3}),
        ({"stage": 3, "offload_param": None, "overlap_comm": None}, {"stage": 3}),
        ({"stage": 3, "offload_param": {"device": "none"}}, {"stage": 3, "offload_param": {"device": "none"}}),
        ({"stage": 2, "cpu_offload": False}, {"stage": 2}),
    ],
)
def test_numbers_and_booleans_as_text_and_what_is_left_to_defaults(read, given, expected):
    assert read(given) == {"zero_optimization": expected}


@pytest.mark.parametrize(
    "more",
    [
        {"fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1}},
        {"fp16": {"enabled": False}},
        {"amp": {"enabled": "auto", "opt_level": "auto"}},
        {"torch_autocast": {"enabled": False, "dtype": "bfloat16"}},
        {"prescale_gradients": False, "sparse_gradients": "false", "data_types": {}, "elasticity": None},
        {"steps_per_print": "auto", "train_batch_size": None},
    ],
)
def test_what_is_switched_off_says_nothing(read, more):
    assert read(**more) == {"zero_optimization": {"stage": 3}}


@pytest.mark.parametrize(
    ("zero", "unknown", "nearest"),
    [
        ({"stage3_max_live_paramters": 1}, "zero_optimization.stage3_max_live_paramters", "stage3_max_live_parameters"),
        ({"stage3_max_live_paramters": "auto"}, "zero_optimization.stage3_max_live_paramters", "max_live_parameters"),
        ({"max_live_parameters": 1}, "zero_optimization.max_live_parameters", "stage3_max_live_parameters"),
        ({"gradient_clipping": 1}, "zero_optimization.gradient_clipping", "mean gradient_clipping"),
        ({"offload_param": {"device": "cpu", "pin_memry": 1}}, "zero_optimization.offload_param.pin_memry", "pin_mem"),
    ],
)
def test_an_unknown_key_of_zero_is_refused_with_the_nearest(read, zero, unknown, nearest):
    with pytest.raises(UserError, match=rf"own\.json: unknown key {unknown}; did you .*{nearest}.*\?$"):
        read(zero)


@pytest.mark.parametrize(
    ("more", "nearest"),
    [
        ({"zero_optimisation": {}}, "zero_optimization"),
        ({"stage": 3}, "zero_optimization.stage"),
        ({"reduce_bucket_size": 5}, "zero_optimization.reduce_bucket_size"),
        ({"offload_optimizer": {"device": "cpu"}}, "zero_optimization.offload_optimizer"),
        ({"train_batchsize": "auto"}, "train_batch_size"),
        ({"bf16": {"enable": True}}, "bf16.enabled"),
        ({"fp16": {"enabled": False, "los_scale": 0}}, "fp16.loss_scale"),
        ({"GRADIENT_CLIPPING": 1}, "gradient_clipping"),
    ],
)
def test_an_unknown_key_elsewhere_is_refused_with_the_nearest(read, more, nearest):
    with pytest.raises(UserError, match=rf"own\.json: unknown key .*; did you mean {nearest}\?$"):
        read(**more)


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ({"stage": "auto"}, r"zero_optimization\.stage='auto': input should be a valid integer"),
        ({"stage": None}, r"zero_optimization\.stage=None: input should be a valid integer"),
        ({"stage": 4}, r"zero_optimization\.stage=4: input should be less than or equal to 3"),
        ({"stage": True}, r"zero_optimization\.stage: true is no number"),
        ({"reduce_bucket_size": -5}, r"reduce_bucket_size=-5: input should be greater than 0"),
        ({"reduce_bucket_size": "5e7"}, r"reduce_bucket_size='5e7': input should be a valid integer"),
        ({"reduce_bucket_size": 5.5}, r"reduce_bucket_size=5\.5: input should be a valid integer"),
        ({"reduce_bucket_size": "9" * 5000}, r"reduce_bucket_size='9{199}\.\.\.: unable to parse"),
        ({"overlap_comm": "yep"}, r"overlap_comm='yep': input should be a valid boolean"),
        ({"offload_param": "cpu"}, r"offload_param='cpu': input should be a valid dictionary; change it$"),
        ({"offload_param": {"device": "auto"}}, r"offload_param\.device='auto': input should be 'none', 'cpu' or 'nv"),
        ({"offload_optimizer": {"device": "nvme"}}, r"offload_optimizer: device=nvme needs nvme_path; add it, or use"),
        ({"stage": 2, "offload_param": {"device": "cpu"}}, r"stage=2 has no parameters to offload; set stage to 3 or"),
        ({"stage": 0, "offload_optimizer": {"device": "cpu"}}, r"stage=0 has no optimizer state to offload; set stage"),
        ({"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}, r"offload_optimizer\.ratio=0\.5 needs st"),
        ({"cpu_offload": True}, r'cpu_offload has a new name; write "offload_optimizer": {"device": "cpu"}'),
        ({"mics_shard_size": 8}, r"mics_shard_size was removed from DeepSpeed; remove it"),
        ({"compute_grad_norm": False}, r"compute_grad_norm=False: input should be True"),
        ([], r"expected a JSON object with a section zero_optimization"),
        (True, r"expected a JSON object with a section zero_optimization"),
    ],
)
def test_a_value_of_zero_that_cannot_be_is_refused_in_one_line(read, zero, message):
    with pytest.raises(UserError, match=message) as refusal:
        read(zero)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"bf16": True}, r"bf16=True: input should be a valid dictionary"),
        ({"fp16": {"enabled": True}}, r"fp16\.enabled=true: expected base\.dtype bf16 or fp32"),
        ({"optimizer": {"type": "AdamW"}}, r"section optimizer is set by the recipe \(train\.optimizer\); remove it"),
        ({"scheduler": {"type": "WarmupLR"}}, r"section scheduler is set by the recipe \(train\.lr_scheduler\)"),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, r"is set by the recipe \(train\.activation_ch"),
        ({"torch_autocast": {"enabled": True}}, r"section torch_autocast changes the dtypes of the run, which the rec"),
        ({"data_types": {"grad_accum_dtype": "fp32"}}, r"section data_types changes the dtypes of the run"),
        ({"communication_data_type": "fp32"}, r"own\.json: communication_data_type changes the dtypes of the run"),
        ({"gradient_accumulation_dtype": "fp32"}, r"gradient_accumulation_dtype changes the dtypes of the run"),
        ({"gradient_allreduce_op": "sum"}, r"gradient_allreduce_op changes how gradients are averaged"),
        ({"sparse_gradients": True}, r"sparse_gradients was removed from DeepSpeed; remove it from the file"),
        ({"bfloat16": {"enabled": True}}, r"bfloat16 is the old name of bf16; write bf16"),
        ({"train_batch_size": 0}, r"train_batch_size=0: input should be greater than 0"),
        ({"gradient_clipping": math.nan}, r"gradient_clipping=nan: input should be a finite number"),
        ({"steps_per_print": math.inf}, r"steps_per_print=inf: input should be a finite number"),
    ],
)
def test_a_key_that_is_the_recipes_or_has_no_place_is_refused_by_name(read, more, message):
    with pytest.raises(UserError, match=message) as refusal:
        read(**more)
    assert "\n" not in str(refusal.value)


def test_all_refused_keys_of_a_section_are_named_at_once(read):
    with pytest.raises(UserError) as refusal:
        read(
            optimizer={"type": "AdamW", "params": {"lr": "auto"}}, scheduler={"type": "WarmupLR"}, sparse_gradients=True
        )
    assert str(refusal.value).partition("own.json: ")[2] == (
        "section optimizer is set by the recipe (train.optimizer); remove it from the file; section scheduler is set "
        "by the recipe (train.lr_scheduler); remove it from the file; sparse_gradients was removed from DeepSpeed; "
        "remove it from the file"
    )


@pytest.mark.parametrize(
    "more",
    [
        {"gradient_predivide_factor": 1.0},
        {"sequence_parallel_size": 1},
        {"prescale_gradients": False, "sparse_gradients": False},
        {"activation_checkpointing": {"partition_activations": False, "number_checkpoints": None, "profile": False}},
    ],
)
def test_refused_keys_that_change_nothing_are_left_out(read, more):
    assert read(**more) == read()


@pytest.mark.parametrize("factor", [0.5, 2, "1"])
def test_a_factor_that_changes_gradients_is_refused(read, factor):
    with pytest.raises(UserError, match="gradient_predivide_factor changes how gradients are averaged"):
        read(gradient_predivide_factor=factor)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"zero_optimization": {"stage": 2, "stage": 3}}', r"not JSON \(key stage is given twice; remove one\)"),
        (b'{"zero_optimization": {"stage": 3,}}', r"not JSON \(.* line 1 column \d+"),
        (b"\xff\xfe{", r"not JSON \("),
        (b"[1]", r"expected a JSON object"),
        (b"[" * 100_000, r"not JSON \(maximum recursion depth exceeded"),
        (b'{"zero_optimization": {}}', r"missing key zero_optimization\.stage: add it"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path, text, message):
    (tmp_path / "own.json").write_bytes(text)
    with pytest.raises(UserError, match=rf"own\.json: {message}"):
        read_deepspeed_file(tmp_path / "own.json")


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    (tmp_path / "own.json").write_bytes(b'\xef\xbb\xbf{"zero_optimization": {"stage": 3}}')
    assert read_deepspeed_file(tmp_path / "own.json") == {"zero_optimization": {"stage": 3}}


class Recorded(dict):
    """A configuration that records the top-level keys it is asked for."""

    asked: ClassVar[set[str]] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:
        return self


def test_every_key_that_deepspeed_asks_for_is_known():
    from deepspeed.runtime.config import DeepSpeedConfig

    DeepSpeedConfig(Recorded(train_batch_size=1))
    assert len(Recorded.asked) > 40, "the search finds them"
    unknown = Recorded.asked - DeepSpeedFile.model_fields.keys() - DeepSpeedFile.refused.keys()
    assert unknown == set()


def sections_of_deepspeed() -> dict[str, type[BaseModel]]:
    """By the name of our section, DeepSpeed's class."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import CometConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero import config as zero
    from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    return {
        "Zero": zero.DeepSpeedZeroConfig,
        "OffloadParam": zero.DeepSpeedZeroOffloadParamConfig,
        "OffloadOptimizer": zero.DeepSpeedZeroOffloadOptimizerConfig,
        "LeafModule": DeepSpeedZeroLeafModuleConfig,
        "Bf16": DeepSpeedBF16Config,
        "Fp16": DeepSpeedFP16Config,
        "CommsLogger": CommsLoggerConfig,
        "EventFiles": TensorBoardConfig,
        "Wandb": WandbConfig,
        "Comet": CometConfig,
        "ThroughputTimer": DeepSpeedThroughputTimerConfig,
    }


REMOVED = {"mics_shard_size", "mics_hierarchical_params_gather", "zeropp_loco_param"}


@pytest.mark.parametrize("name", ["Zero", "OffloadParam", "OffloadOptimizer", "LeafModule", "Bf16", "Fp16",
                                  "CommsLogger", "EventFiles", "Wandb", "Comet", "ThroughputTimer"])  # fmt: skip
def test_a_section_has_the_keys_and_defaults_of_deepspeeds(name):
    ours, theirs = getattr(deepspeed_sections, name), sections_of_deepspeed()[name]
    fields = {field.alias or key: field for key, field in theirs.model_fields.items()}
    assert ours.model_fields.keys() | ours.refused.keys() - REMOVED == fields.keys()
    for key, field in ours.model_fields.items():
        default = field.get_default()
        # DeepSpeed fills lists and sections in later; a file must say its stage.
        if not isinstance(default, BaseModel | list) and not field.is_required():
            assert default == fields[key].get_default(), key


def test_reading_a_file_imports_nothing_heavy():
    code = (
        "import sys; from pathlib import Path; from trainer.distributed.deepspeed_file import read_deepspeed_file; "
        "read_deepspeed_file(Path('zero3')); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "deepspeed", "numpy"} & set(done.stdout.split())
