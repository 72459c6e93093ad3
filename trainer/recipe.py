"""The recipe: typed, validated sections, and the one place of every default. Imports nothing heavy."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from data_prep.config import DataConfig, Passes, Section, at_most
from data_prep.user_path import UserPath, UserPathOrName

NUM_EXPERTS, EXPERT_RANK = 4, 16

TAKE_LENGTHS = ("flash_attention_2", "varlen")
"""Kinds of attention that take documents by their lengths, on GPUs; the others take a mask, which position_ids give."""

Seconds = Annotated[PositiveFloat, at_most(10**8)]  # libraries count nanoseconds in 64 bits
Steps = Annotated[PositiveInt, at_most(10**9)]
Batch = Annotated[PositiveInt, at_most(10**7)]
Rank = Annotated[PositiveInt, Field(strict=True), at_most(2**20)]
ShardGroup = Annotated[PositiveInt, Field(strict=True)]
Alpha = Annotated[PositiveFloat, at_most(10**9)]
Seed = Annotated[int, Field(ge=0), at_most(2**63 - 1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Checkpointing = Literal["offload"] | bool


class RunConfig(Section):
    """Where a run is stored and what makes it repeatable."""

    name: str = Field(pattern=r"^[\w-][\w.-]*$", description="folder of the run inside output_dir")
    output_dir: UserPath = Field(Path("runs"), description="parent folder of all runs")
    seed: Seed = Field(0, description="seed of adapter initialization, dropout and row order")
    deterministic: bool = Field(False, description="use only kernels that give the same bits in every rerun; slower")
    debug: bool = Field(
        False, description="let train.activation_checkpointing: offload run on a CPU, where it moves nothing"
    )
    nodes: PositiveInt | None = Field(
        None, strict=True, description="exact number of machines, else the run is refused; null: any number"
    )
    start_timeout: Seconds = Field(
        1800.0, description="seconds a rank waits for another before the first step; then the run fails"
    )
    collective_timeout: Seconds = Field(
        600.0, description="seconds a rank waits for another from the first step on; then the run fails"
    )

    @property
    def directory(self) -> Path:
        """Folder that holds everything the run writes."""
        return self.output_dir / self.name


class BaseModelConfig(Section):
    """The frozen language model under the adapter."""

    model: UserPathOrName = Field(description="folder of a transformers causal LM, or its Hub id")
    revision: str | None = Field(None, description="commit, tag or branch of a Hub id; null: the default branch")
    quantization: Literal["nf4", "none"] = Field(
        "nf4", description="storage of the decoder's linear layers: nf4 (4 bits), or none (as dtype)"
    )
    dtype: Literal["bf16", "fp32"] = Field(
        "bf16", description="compute dtype, and storage dtype of everything that is not quantized"
    )
    attention: Literal["sdpa", "eager", "flash_attention_2", "varlen"] = Field(
        "sdpa",
        description="attention kernels; varlen (torch's own) and flash_attention_2 (package flash-attn) compute no "
        "more than each document needs, on CUDA GPUs and with dtype bf16",
    )
    shard_group: Literal["world", "node"] | ShardGroup = Field(
        "world",
        description="ranks among which ZeRO-3 divides one copy of the base: all (world), those of one machine (node), "
        "or so many neighbours; 1: whole on each rank",
    )
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")

    @model_validator(mode="after")
    def _flash_attention_has_no_fp32(self) -> "BaseModelConfig":
        if self.attention in TAKE_LENGTHS and self.dtype == "fp32":
            raise ValueError(f"attention={self.attention} has no kernels for dtype=fp32; set dtype=bf16, or sdpa")
        return self


class AdapterConfig(Section):
    """What is trained. r_B = expert_rank, r_A = total_rank = num_experts * expert_rank (TeamLoRA, section 3)."""

    method: Literal["teamlora", "moelora", "hydralora", "lora"] = Field(
        "teamlora", description="adapter method; the other three are for comparison"
    )
    num_experts: Rank = Field(NUM_EXPERTS, description="k, the number of experts per adapted linear layer; 1 for lora")
    expert_rank: Rank = Field(EXPERT_RANK, description="r_B, the rank of one expert matrix B")
    total_rank: Rank = Field(
        NUM_EXPERTS * EXPERT_RANK,
        description="r_A = num_experts * expert_rank, the rank of a LoRA of the same size; either rank gives the other",
    )
    alpha: Alpha = Field(32.0, description="scale: the update is multiplied by alpha / expert_rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input during training")
    target_modules: list[str] = Field(
        ["gate_proj", "up_proj", "down_proj"], min_length=1, description="name endings of the linear layers to adapt"
    )
    balance_loss_weight: float = Field(
        0.0, ge=0, description="weight of the loss that pulls the mean router weights toward 1/k; 0: off"
    )
    renormalize: bool = Field(
        False, description="teamlora: divide the weights after competition by their sum; the paper does not"
    )
    shard_group: Literal["world", "node"] | ShardGroup = Field(
        "world",
        description="ranks among which ZeRO-3 divides one copy of what learns, with its gradients and optimizer state: "
        "as base.shard_group",
    )
    init_from: UserPath | None = Field(None, description="folder of an adapter to start from; null: a fresh one")

    @model_validator(mode="before")
    @classmethod
    def _derive_ranks(cls, given: Any) -> Any:
        """Derives expert_rank or total_rank from the other, and refuses a contradiction."""
        if not isinstance(given, dict):
            return given
        values = dict(given)
        lora = values.get("method") == "lora"
        experts = values.setdefault("num_experts", 1 if lora else NUM_EXPERTS)
        numbers = [values[key] for key in ("num_experts", "expert_rank", "total_rank") if key in values]
        if not all(type(number) is int and number > 0 for number in numbers):
            return values  # the field types report what is wrong
        expert_rank, total_rank = values.get("expert_rank"), values.get("total_rank")
        if lora and experts != 1:
            raise ValueError(f"num_experts={experts}: method lora has one; remove num_experts or change method")
        if total_rank is None:
            values["total_rank"] = experts * (expert_rank or values.setdefault("expert_rank", EXPERT_RANK))
        elif total_rank % experts:
            near = max(experts, round(total_rank / experts) * experts)
            raise ValueError(
                f"total_rank={total_rank} (r_A) is not divisible by num_experts={experts}; nearest is {near}"
            )
        elif expert_rank not in (None, total_rank // experts):
            raise ValueError(
                f"total_rank={total_rank} contradicts num_experts={experts} x expert_rank={expert_rank}; give one"
            )
        else:
            values["expert_rank"] = total_rank // experts
        return values

    @model_validator(mode="after")
    def _only_what_the_method_has(self) -> "AdapterConfig":
        if self.renormalize and self.method != "teamlora":
            raise ValueError(f"renormalize=true: method {self.method} has no interaction matrix; remove it")
        if self.balance_loss_weight and self.method == "lora":
            raise ValueError("balance_loss_weight: method lora has no router; remove it")
        return self


class ExpertsConfig(Section):
    """Which ranks own the experts (trainer.distributed.expert_parallel); by default ZeRO shards them like the rest."""

    parallel_size: PositiveInt = Field(1, description="ranks that divide a layer's experts among them; 1: no placement")
    replicate: bool = Field(
        False, description="keep a rank's experts whole on each of its replicas, instead of sharding them by ZeRO-3"
    )
    dispatch: Literal["auto", "weights", "tokens"] = Field(
        "auto", description="what travels between ranks; auto: the cheaper of the two, measured at the start"
    )
    across_nodes: bool = Field(False, description="allow the ranks of one expert group to span several nodes")

    @model_validator(mode="after")
    def _only_with_placement(self) -> "ExpertsConfig":
        if self.parallel_size == 1 and (self.replicate or self.across_nodes):
            raise ValueError("replicate and across_nodes need parallel_size > 1; set it or remove them")
        return self


class TrainConfig(Section):
    """Length, batch and optimizer. The batch is global, so a run means the same on any number of ranks."""

    steps: Steps | None = Field(None, description="optimizer steps; or set epochs")
    epochs: Passes | None = Field(None, description="passes over the training rows; or set steps")
    global_batch_size: Batch = Field(
        description="rows per optimizer step over all ranks; a multiple of micro_batch_size times the ranks"
    )
    micro_batch_size: Batch = Field(1, description="rows per rank in one forward pass")
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = Field(
        "adamw", description="optimizer; the two with 8-bit state need GPUs"
    )
    learning_rate: PositiveFloat = Field(2e-4, description="peak learning rate")
    betas: tuple[Share, Share] = Field((0.9, 0.999), description="AdamW's two decay rates")
    epsilon: PositiveFloat = Field(1e-8, description="AdamW's epsilon")
    weight_decay: float = Field(
        0.0, ge=0, description="decay toward 0 of every trained parameter, TeamLoRA's interaction matrix included"
    )
    lr_scheduler: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="learning rate after warm-up: decays to 0 (cosine, linear) or stays (constant)"
    )
    warmup_steps: int | None = Field(None, ge=0, description="steps of linear warm-up; or set warmup_ratio")
    warmup_ratio: float | None = Field(
        None, ge=0, lt=1, description="warm-up as a share of all steps; or set warmup_steps"
    )
    max_grad_norm: float = Field(1.0, ge=0, description="clips the global gradient norm; 0: no clipping")
    activation_checkpointing: Checkpointing = Field(
        False,
        description="recompute decoder layers in backward: less memory, a third more time; offload: from inputs kept "
        "in host memory",
    )
    loss_chunk: int | None = Field(
        None,
        ge=0,
        description="labeled tokens whose logits exist at once; 0: all; null: as many as take 64 MiB in fp32",
    )
    eval_every: int = Field(0, ge=0, description="steps between losses on the held-out rows; 0: at the end only")
    eval_rows: PositiveInt | None = Field(None, description="held-out rows used for that loss; null: all")
    early_stopping_patience: PositiveInt | None = Field(
        None, description="stop after this many held-out losses in a row that do not improve on the best; null: never"
    )
    resume: UserPathOrName = Field(
        "auto", description="auto: continue where this run stopped; never; or the folder of a checkpoint"
    )

    @model_validator(mode="after")
    def _one_of_each(self) -> "TrainConfig":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"steps={self.steps} and epochs={self.epochs}: expected exactly one; remove or add one")
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            raise ValueError("warmup_steps and warmup_ratio are both given: expected at most one; remove one")
        if self.early_stopping_patience is not None and not self.eval_every:
            raise ValueError(
                f"early_stopping_patience={self.early_stopping_patience} needs held-out losses on the way; "
                "set eval_every"
            )
        return self


class DeepSpeedConfig(Section):
    """How DeepSpeed shards the run."""

    config: UserPath = Field(
        description='DeepSpeed JSON file, or a name in ds_configs such as zero3; the recipe fills its "auto" values'
    )


class CheckpointConfig(Section):
    """Which steps a run can go back to. See trainer.checkpoint for what a checkpoint holds."""

    save_every: int = Field(100, ge=0, description="steps between checkpoints; 0: only when a signal stops the run")
    keep_last: PositiveInt = Field(2, description="newest checkpoints to keep")
    keep_every: PositiveInt | None = Field(
        None, description="keep checkpoints at multiples of this step as well; null: none"
    )
    keep_best: bool = Field(True, description="save at each new lowest held-out loss, and keep the latest of these")
    load_best_at_end: bool = Field(
        False, description="publish the best checkpoint's adapter, not the last step's; needs train.eval_every"
    )

    @model_validator(mode="after")
    def _keeps_what_it_loads(self) -> "CheckpointConfig":
        if self.load_best_at_end and not self.keep_best:
            raise ValueError("load_best_at_end=true, but keep_best=false keeps no best checkpoint; set keep_best=true")
        return self


class ReportConfig(Section):
    """What is written for people to watch."""

    tensorboard: bool = Field(True, description="write TensorBoard event files into the run")
    router_every: PositiveInt = Field(10, description="steps between router measurements")


class Recipe(Section):
    """A whole recipe. Relations between sections are checked here."""

    run: RunConfig
    base: BaseModelConfig
    adapter: AdapterConfig = Field(default_factory=lambda: AdapterConfig.model_validate({}))
    experts: ExpertsConfig = ExpertsConfig()
    data: DataConfig
    train: TrainConfig
    deepspeed: DeepSpeedConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    report: ReportConfig = ReportConfig()

    @model_validator(mode="after")
    def _best_needs_held_out_losses(self) -> "Recipe":
        if self.checkpoint.load_best_at_end and not self.train.eval_every:
            raise ValueError(
                "checkpoint.load_best_at_end=true needs held-out losses on the way; set train.eval_every, such as 100"
            )
        return self

    @model_validator(mode="after")
    def _experts_can_be_placed(self) -> "Recipe":
        size, k = self.experts.parallel_size, self.adapter.num_experts
        if size > 1 and self.adapter.method == "lora":
            raise ValueError(f"experts.parallel_size={size}: method lora has no experts to place; set it to 1")
        if k % size:
            raise ValueError(
                f"experts.parallel_size={size} does not divide adapter.num_experts={k}; "
                f"use one of {', '.join(str(n) for n in range(1, k + 1) if k % n == 0)}"
            )
        return self
