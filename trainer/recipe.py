"""The recipe: one YAML file, typed, validated and resolved before anything heavy is imported."""

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from data_prep.config import DataConfig, FilesSource, HubSource, ReasoningGymSource, Section, SuiteSource
from data_prep.user_error import UserError

_SOURCES = {  # by the tag that tells them apart
    "files": FilesSource,
    "hub": HubSource,
    "reasoning_gym": ReasoningGymSource,
    "suite": SuiteSource,
}


Share = Annotated[float, Field(ge=0, lt=1)]


class RunConfig(Section):
    """Where a run lives and what makes it repeatable."""

    name: str = Field(pattern=r"^[\w-][\w.-]*$", description="folder of the run inside output_dir")
    output_dir: Path = Field(Path("runs"), description="parent folder of all runs")
    seed: int = Field(0, ge=0, description="seeds adapter initial values, dropout and the order of rows")
    deterministic: bool = Field(False, description="only kernels that give the same bits in every rerun; slower")
    nodes: PositiveInt | None = Field(None, strict=True, description="machines that the ranks must be on; null: any")
    start_timeout: PositiveFloat = Field(
        1800.0, description="seconds after which ranks give up that wait for another before the first step"
    )
    collective_timeout: PositiveFloat = Field(600.0, description="the same from the first step on")

    @property
    def directory(self) -> Path:
        """Folder that holds everything the run writes."""
        return self.output_dir / self.name


class BaseModelConfig(Section):
    """The frozen language model under the adapter."""

    model: str = Field(description="folder of a transformers causal LM, or its Hub id")
    revision: str | None = Field(None, description="commit, tag or branch of a Hub id")
    quantization: Literal["nf4", "none"] = Field("nf4", description="how decoder linears are stored")
    dtype: Literal["bf16", "fp32"] = Field("bf16", description="compute dtype; what is not quantised is stored so")
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")

    @model_validator(mode="after")
    def _flash_attention_knows_no_fp32(self) -> "BaseModelConfig":
        if self.attention == "flash_attention_2" and self.dtype == "fp32":
            raise ValueError("attention=flash_attention_2 has no kernels for dtype=fp32; set dtype=bf16, or sdpa")
        return self


class AdapterConfig(Section):
    """What learns. r_B = expert_rank, r_A = total_rank = num_experts * expert_rank (TeamLoRA, section 3)."""

    method: Literal["teamlora", "moelora", "hydralora", "lora"] = "teamlora"
    num_experts: PositiveInt = Field(4, strict=True, description="k; 1 for lora")
    expert_rank: PositiveInt = Field(16, strict=True, description="r_B, the rank of one expert matrix B")
    total_rank: PositiveInt = Field(
        64, strict=True, description="r_A, the rank of a LoRA with the same matrices A and B"
    )
    alpha: PositiveFloat = Field(32.0, description="output scale: alpha / expert_rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the adapter's input")
    target_modules: list[str] = Field(["gate_proj", "up_proj", "down_proj"], min_length=1)
    balance_loss_weight: float = Field(0.0, ge=0, description="pulls the mean router weights towards 1/k")
    renormalize: bool = Field(False, description="teamlora: divide the interacting weights by their sum")
    init_from: Path | None = Field(None, description="folder of an adapter to start from")

    @model_validator(mode="before")
    @classmethod
    def _derive_ranks(cls, given: Any) -> Any:
        """Fills in whichever of expert_rank and total_rank is not given, and refuses a contradiction."""
        if not isinstance(given, dict):
            return given
        values = dict(given)
        lora = values.get("method") == "lora"
        experts = values.setdefault("num_experts", 1 if lora else 4)
        numbers = [values[key] for key in ("num_experts", "expert_rank", "total_rank") if key in values]
        if not all(type(number) is int and number > 0 for number in numbers):
            return values  # the field types tell what is wrong
        expert_rank, total_rank = values.get("expert_rank"), values.get("total_rank")
        if lora and experts != 1:
            raise ValueError(f"num_experts={experts}: method lora has one; remove num_experts or change method")
        if total_rank is None:
            values["total_rank"] = experts * (expert_rank or values.setdefault("expert_rank", 16))
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
    """On which ranks the experts live (trainer.distributed.expert_parallel); by default ZeRO shards them too."""

    parallel_size: PositiveInt = Field(1, description="ranks that share a layer's experts out; 1: no placement")
    replicate: bool = Field(False, description="each replica of a rank keeps its experts whole; else cut by ZeRO-3")
    dispatch: Literal["auto", "weights", "tokens"] = Field("auto", description="what travels; auto: the fewer bytes")
    across_nodes: bool = Field(False, description="let the ranks of one group stand on several nodes")

    @model_validator(mode="after")
    def _only_with_placement(self) -> "ExpertsConfig":
        if self.parallel_size == 1 and (self.replicate or self.across_nodes):
            raise ValueError("replicate and across_nodes need parallel_size > 1; set it or remove them")
        return self


class TrainConfig(Section):
    """Length, batch and optimizer of a run. The batch is global, so a run means the same on any number of ranks."""

    steps: PositiveInt | None = Field(None, description="optimizer steps; or give epochs")
    epochs: PositiveFloat | None = Field(None, description="passes over the training rows; or give steps")
    global_batch_size: PositiveInt = Field(description="rows an optimizer step, over all ranks")
    micro_batch_size: PositiveInt = Field(1, description="rows a rank computes at once")
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    learning_rate: PositiveFloat = 2e-4
    betas: tuple[Share, Share] = (0.9, 0.999)
    epsilon: PositiveFloat = 1e-8
    weight_decay: float = Field(0.0, ge=0, description="of every trained parameter, TeamLoRA's M too: towards 0")
    lr_scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int | None = Field(None, ge=0, description="steps of linear warm-up; or give warmup_ratio")
    warmup_ratio: float | None = Field(None, ge=0, lt=1, description="share of all steps; or give warmup_steps")
    max_grad_norm: float = Field(1.0, ge=0, description="clips the global gradient norm; 0 turns it off")
    activation_checkpointing: bool = Field(False, description="recompute decoder layers in backward")
    eval_every: int = Field(0, ge=0, description="steps between losses on the held-out rows; 0: at the end only")
    eval_rows: PositiveInt | None = Field(None, description="held-out rows taken for that loss; null: all")
    early_stopping_patience: PositiveInt | None = Field(
        None, description="end after so many held-out losses in a row that are no better than the best; null: never"
    )
    resume: str = Field(
        "auto", description="auto: go on where this run stopped; never; or a checkpoint's folder to go on from"
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
    config: Path = Field(description='DeepSpeed JSON; its "auto" values are filled from this recipe')


class CheckpointConfig(Section):
    """Which steps of a run can be gone back to. What one holds: trainer.checkpoint."""

    save_every: int = Field(100, ge=0, description="steps between checkpoints; 0: only when asked to stop")
    keep_last: PositiveInt = Field(2, description="the newest ones that stay")
    keep_every: PositiveInt | None = Field(None, description="those at multiples of it stay as well; null: none")
    keep_best: bool = Field(True, description="save where the held-out loss is the best so far, and keep the last such")
    load_best_at_end: bool = Field(False, description="the adapter is that checkpoint's, not the last step's")

    @model_validator(mode="after")
    def _keeps_what_it_loads(self) -> "CheckpointConfig":
        if self.load_best_at_end and not self.keep_best:
            raise ValueError("load_best_at_end=true, but keep_best=false keeps no best checkpoint; set keep_best=true")
        return self


class ReportConfig(Section):
    tensorboard: bool = Field(True, description="write TensorBoard event files into the run")
    router_every: PositiveInt = Field(10, description="steps between router measurements")


class Recipe(Section):
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
    def _documents_stay_apart(self) -> "Recipe":
        """With several rows transformers' flash attention looks at no position_ids, by which they are told apart."""
        rows = self.train.micro_batch_size
        if self.base.attention == "flash_attention_2" and rows > 1:
            raise ValueError(
                f"train.micro_batch_size={rows}: with base.attention=flash_attention_2 packed documents stay apart in "
                "one row only; set train.micro_batch_size=1 (and a longer data.seq_len), or base.attention=sdpa"
            )
        return self

    @model_validator(mode="after")
    def _best_is_looked_for(self) -> "Recipe":
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


def load_recipe(path: Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Reads a YAML recipe, applies `key.path=value` overrides and validates the result.

    Raises UserError, one line, for anything a person can get wrong.
    """
    values = _read_yaml(path)
    for override in overrides:
        _apply_override(values, override)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{path}: {_one_line(error)}") from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; load_recipe reads it back to an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(f"recipe {path}: {reason}; give the path of a YAML recipe, see launch/recipes/") from None
    except yaml.YAMLError as error:
        raise UserError(f"recipe {path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"recipe {path}: expected sections run, base, ... at top level; see launch/recipes/")
    return values


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"argument {override!r}: expected key.path=value, for example train.steps=100")
    *parents, last = key.split(".")
    for parent in parents:
        if not isinstance(values.setdefault(parent, {}), dict):
            raise UserError(f"argument {override!r}: {parent} is a value, not a section with keys")
        values = values[parent]
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"argument {override!r}: the value is not YAML; quote it") from None


def _one_line(error: ValidationError) -> str:
    """The first problem as `key=value: what was expected; what to do`."""
    problems = error.errors()
    # A misspelt key that is required is told as missing before it is told as unknown.
    first = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])
    key = _dotted(first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown key {key}{_nearest(first['loc'])}"
    if first["type"] == "missing":
        return f"missing key {key}: add it"
    if first["type"] == "value_error":
        return f"{key}: {first['ctx']['error']}" if key else str(first["ctx"]["error"])
    return f"{key}={first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}; change it"


def _dotted(location: tuple[int | str, ...]) -> str:
    """('data', 'sources', 0, 'jsonl', 'path') -> data.sources[0].path; the union's tag is no key of the recipe."""
    text = ""
    for before, part in zip((None, *location), location, strict=False):
        if isinstance(part, int):
            text += f"[{part}]"
        elif not isinstance(before, int) or part not in _SOURCES:
            text += f".{part}" if text else part
    return text


def _nearest(location: tuple[int | str, ...]) -> str:
    *parents, name = location
    siblings = {field: _dotted((*parents, field)) for field in _section_at(parents).model_fields}
    elsewhere = {key.rpartition(".")[2]: key for key in _known_keys(Recipe)}
    for keys in (siblings, elsewhere):
        if near := difflib.get_close_matches(str(name), keys, n=1, cutoff=0.6):
            return f"; did you mean {keys[near[0]]}?"
    return f"; known keys: {', '.join(siblings.values())}"


def _section_at(location: Sequence[int | str]) -> type[BaseModel]:
    section: type[BaseModel] = Recipe
    for part in location:
        if part in _SOURCES:
            section = _SOURCES[part]
        elif part in section.model_fields and _is_section(section.model_fields[part].annotation):
            section = section.model_fields[part].annotation
    return section


def _known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        if _is_section(field.annotation):
            yield from _known_keys(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
