"""Every key of DeepSpeed's JSON file, with its type, bounds and default, and the keys that have no place in it here.

Mirrors DeepSpeed 0.19.8; a test compares them. Imports neither torch nor DeepSpeed, which takes seconds, so that every
command can refuse a file before anything heavy happens.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from data_prep.user_path import UserPathOrName

LARGEST = 2**63 - 1


def _no_boolean(value: Any) -> Any:
    """pydantic and DeepSpeed would take true for 1."""
    if isinstance(value, bool):
        raise ValueError(f"{str(value).lower()} is no number; write one, or remove the key")
    return value


Count = Annotated[int, BeforeValidator(_no_boolean), Field(ge=0, le=LARGEST)]
Size = Annotated[int, BeforeValidator(_no_boolean), Field(gt=0, le=LARGEST)]
Number = Annotated[float, BeforeValidator(_no_boolean), Field(ge=0)]
Share = Annotated[float, BeforeValidator(_no_boolean), Field(ge=0, le=1)]


def _is_off(value: Any) -> bool:
    """Whether a value says no more than its absence: null, "auto", false, or a section that is switched off or says
    nothing else."""
    if isinstance(value, dict):
        return ("enabled" in value and _is_off(value["enabled"])) or all(map(_is_off, value.values()))
    return value is None or value is False or value in ("auto", "false")


class _Section(BaseModel):
    """A section: unknown keys are errors; null and "auto" leave a key to its default."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    refused: ClassVar[dict[str, str]] = {}  # keys that DeepSpeed knows or knew, and why they have no place here
    neutral: ClassVar[dict[str, Any]] = {}  # values of refused keys that change nothing
    needed: ClassVar[set[str]] = set()  # keys that decide too much to be left to a default by "auto"

    @model_validator(mode="before")
    @classmethod
    def _leave_out_what_is_not_given(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        problems = [
            f"{'section ' if isinstance(value, dict) else ''}{key} {cls.refused[key]}"
            for key, value in given.items()
            if key in cls.refused and not _is_off(value) and value != cls.neutral.get(key)
        ]
        if problems:
            raise ValueError("; ".join(problems))
        return {key: value for key, value in given.items() if not cls._is_not_given(key, value)}

    @classmethod
    def _is_not_given(cls, key: str, value: Any) -> bool:
        return key in cls.refused or (key in cls.model_fields.keys() - cls.needed and value in (None, "auto"))


class Bf16(_Section):
    """bf16 training."""

    enabled: bool = False
    immediate_grad_update: bool = False
    check_grad_overflow: Literal[True] = True  # how a step that is not finite is noticed
    bf16_master_weights_and_grads: Literal[False] = False
    bf16_optimizer_states: Literal[False] = False


class Fp16(_Section):
    """fp16 training, which recipes do not have: files of the HF trainer carry it switched off."""

    enabled: bool = False
    auto_cast: bool = False
    loss_scale: Number = 0
    initial_scale_power: Count = 16
    loss_scale_window: Count = 1000
    hysteresis: Count = 2
    consecutive_hysteresis: bool = False
    min_loss_scale: Number = 1
    fp16_master_weights_and_grads: bool = False


class _Offload(_Section):
    needed = {"device"}

    device: Literal["none", "cpu", "nvme"] = "none"
    nvme_path: UserPathOrName | None = None
    pin_memory: bool = True

    @model_validator(mode="after")
    def _nvme_has_a_place(self) -> "_Offload":
        if self.device == "nvme" and self.nvme_path is None:
            raise ValueError("device=nvme needs nvme_path; add it, or use cpu")
        return self


class OffloadParam(_Offload):
    """Where parameters wait between their uses."""

    buffer_count: Count = 5
    buffer_size: Count = 10**8
    max_in_cpu: Count = 10**9


class OffloadOptimizer(_Offload):
    """Where the optimizer's state is kept."""

    buffer_count: Count = 4
    pipeline_read: bool = False
    pipeline_write: bool = False
    fast_init: bool = False
    ratio: Share = 1.0
    super_offload: Literal[False] = False  # needs an optimizer of DeepSpeed's
    cpuadam_cores_perc: Share = 0.8


class LeafModule(_Section):
    """Modules that ZeRO-3 gathers as a whole."""

    classes: str | list[str] = []
    names: str | list[str] = []
    name_suffixes: str | list[str] = []


class Zero(_Section):
    """ZeRO. Sizes are in elements."""

    needed = {"stage"}
    refused = {
        "cpu_offload": 'has a new name; write "offload_optimizer": {"device": "cpu"}',
        "cpu_offload_param": 'has a new name; write "offload_param": {"device": "cpu"}',
        "cpu_offload_use_pin_memory": "has a new name; write pin_memory in the section of the offload",
        "stage3_gather_fp16_weights_on_model_save": "has a new name; write stage3_gather_16bit_weights_on_model_save",
        **dict.fromkeys(
            ("mics_shard_size", "mics_hierarchical_params_gather", "zeropp_loco_param"),
            "was removed from DeepSpeed; remove it from the file",
        ),
        "zenflow": "needs an optimizer of DeepSpeed's, and the recipe's is torch's; remove it from the file",
    }

    stage: Annotated[Count, Field(le=3)]  # DeepSpeed's default, 0, would keep a base whole that was to be sharded
    contiguous_gradients: bool = True
    reduce_scatter: bool = True
    reduce_bucket_size: Size = 5 * 10**8
    use_multi_rank_bucket_allreduce: bool = True
    allgather_partitions: bool = True
    allgather_bucket_size: Count = 5 * 10**8
    overlap_comm: bool | None = None
    compute_grad_norm: Literal[True] = True  # the norm is reported, and shows steps that are not finite
    load_from_fp32_weights: bool = True
    elastic_checkpoint: bool = False
    offload_param: OffloadParam = OffloadParam()
    offload_optimizer: OffloadOptimizer = OffloadOptimizer()
    sub_group_size: Count = 10**9
    stage3_prefetch_bucket_size: Count = 5 * 10**7
    stage3_param_persistence_threshold: Count = 10**5
    stage3_model_persistence_threshold: Count = LARGEST
    stage3_max_live_parameters: Count = 10**9
    stage3_max_reuse_distance: Count = 10**9
    stage3_gather_16bit_weights_on_model_save: bool = False
    stage3_module_granularity_threshold: Count = 0
    stage3_use_all_reduce_for_fetch_params: bool = False
    stage3_allgather_sequential: bool = False
    ignore_unused_parameters: bool = True
    legacy_stage1: bool = False
    round_robin_gradients: bool = False
    parameter_alignment: bool = False
    zero_hpz_partition_size: Count = 1
    zero_quantized_weights: bool = False
    zero_quantized_nontrainable_weights: bool = False
    zero_quantized_gradients: bool = False
    memory_efficient_linear: bool = True
    pipeline_loading_checkpoint: bool = False
    override_module_apply: bool = True
    log_trace_cache_warnings: bool = False
    enable_sanity_checks: bool = False
    save_muon_momentum_buffer_in_memory: bool = False
    leaf_module: LeafModule = LeafModule()

    @model_validator(mode="after")
    def _stage_has_what_is_offloaded(self) -> "Zero":
        """DeepSpeed ignores an offload that the stage does not have."""
        if self.offload_param.device != "none" and self.stage != 3:
            raise ValueError(f"stage={self.stage} has no parameters to offload; set stage to 3 or remove offload_param")
        if self.offload_optimizer.device != "none" and self.stage == 0:
            raise ValueError("stage=0 has no optimizer state to offload; set stage to 1-3 or remove offload_optimizer")
        if self.offload_optimizer.ratio < 1 and self.stage != 3:
            raise ValueError(f"offload_optimizer.ratio={self.offload_optimizer.ratio} needs stage 3; remove it")
        return self


class Aio(_Section):
    """Reads and writes of NVMe."""

    block_size: Size = 2**20
    queue_depth: Size = 8
    intra_op_parallelism: Size = 1
    single_submit: bool = False
    overlap_events: bool = True
    use_gds: bool = False


class CommsLogger(_Section):
    """Logs collectives."""

    enabled: bool = False
    prof_all: bool = True
    prof_ops: list[str] = []
    verbose: bool = False
    debug: bool = False


class FlopsProfiler(_Section):
    """Counts floating-point operations."""

    enabled: bool = False
    recompute_fwd_factor: Number = 0.0
    profile_step: Count = 1
    module_depth: int = -1
    top_modules: Count = 1
    detailed: bool = True
    output_file: str | None = None


class EventFiles(_Section):
    """DeepSpeed's own monitor, to TensorBoard or CSV."""

    enabled: bool = False
    output_path: str = ""
    job_name: str = "DeepSpeedJobName"


class Wandb(_Section):
    """DeepSpeed's own monitor, to Weights & Biases."""

    enabled: bool = False
    group: str | None = None
    team: str | None = None
    project: str = "deepspeed"


class Comet(_Section):
    """DeepSpeed's own monitor, to Comet."""

    enabled: bool = False
    samples_log_interval: Size = 100
    project: str | None = None
    workspace: str | None = None
    api_key: str | None = None
    experiment_name: str | None = None
    experiment_key: str | None = None
    online: bool | None = None
    mode: str | None = None


class ThroughputTimer(_Section):
    """DeepSpeed's own measurement of throughput."""

    enabled: bool = True
    synchronized: bool = True


class Timers(_Section):
    """DeepSpeed's timers."""

    throughput: ThroughputTimer = ThroughputTimer()


class DeepSpeedFile(_Section):
    """The whole file."""

    neutral = {"gradient_predivide_factor": 1, "sequence_parallel_size": 1}
    refused = {
        "optimizer": "is set by the recipe (train.optimizer); remove it from the file",
        "scheduler": "is set by the recipe (train.lr_scheduler); remove it from the file",
        "activation_checkpointing": "is set by the recipe (train.activation_checkpointing); remove it from the file",
        "bfloat16": "is the old name of bf16; write bf16",
        **dict.fromkeys(
            ("data_types", "torch_autocast", "communication_data_type", "seq_parallel_communication_data_type",
             "gradient_accumulation_dtype", "weight_quantization"),
            "changes the dtypes of the run, which the recipe sets (base.dtype); remove it from the file",
        ),
        **dict.fromkeys(
            ("prescale_gradients", "gradient_predivide_factor", "gradient_allreduce_op",
             "managed_gradient_accumulation"),
            "changes how gradients are averaged, which the recipe's batch sets; remove it from the file",
        ),
        **dict.fromkeys(
            ("checkpoint", "datastates_ckpt", "nebula"),
            "has no effect: the recipe's section checkpoint says what is saved; remove it from the file",
        ),
        **dict.fromkeys(
            ("pipeline", "tensor_parallel", "expert_parallel", "sequence_parallel_size", "hybrid_engine", "compile",
             "use_data_before_expert_parallelism", "data_efficiency", "autotuning", "dataloader_drop_last",
             "disable_allgather", "vocabulary_size"),
            "is a part of DeepSpeed that a run does not use; remove it from the file",
        ),
        **dict.fromkeys(
            ("amp", "compression_training", "quantize_training", "sparse_gradients", "eigenvalue", "sparse_attention",
             "elasticity", "graph_harvesting", "curriculum_learning", "progressive_layer_drop"),
            "was removed from DeepSpeed; remove it from the file",
        ),
    }  # fmt: skip

    zero_optimization: Zero
    train_batch_size: Size | None = None
    train_micro_batch_size_per_gpu: Size | None = None
    gradient_accumulation_steps: Size | None = None
    gradient_clipping: Number | None = None
    bf16: Bf16 = Bf16()
    fp16: Fp16 = Fp16()
    zero_allow_untested_optimizer: bool = False
    zero_force_ds_cpu_optimizer: bool = True
    steps_per_print: Count | None = None
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    dump_state: bool = False
    disable_python_gc: bool = False
    log_level: str | None = None
    aio: Aio = Aio()
    comms_logger: CommsLogger = CommsLogger()
    flops_profiler: FlopsProfiler = FlopsProfiler()
    tensorboard: EventFiles = EventFiles()
    csv_monitor: EventFiles = EventFiles()
    wandb: Wandb = Wandb()
    comet: Comet = Comet()
    timers: Timers = Timers()
