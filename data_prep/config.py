"""The recipe's `data` section: where raw data is, how it becomes rows, and where the prepared set is written.

Imports only pydantic, so that a recipe can be read and refused before anything heavy is imported.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from data_prep.user_path import UserPath

QUESTION = "{question}"


def at_most(largest: int) -> AfterValidator:
    """A bound far above what anyone means, for numbers that would end later in memory, time or a library's integers."""

    def check(value: Any) -> Any:
        if value is not None and value > largest:
            raise ValueError(f"{value} is over {largest:,}, the most that is possible; change it")
        return value

    return AfterValidator(check)


Rows = Annotated[PositiveInt, at_most(10**9)]
Passes = Annotated[PositiveFloat, at_most(10**6)]
Weight = Annotated[PositiveFloat, at_most(10**9)]
Length = Annotated[int, Field(ge=2), at_most(2**24)]


class Section(BaseModel):
    """A section of a recipe: unknown keys are errors, numbers are finite, and values never change once validated."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


FieldName = Literal[
    "instruction", "input", "output", "history", "prompt", "completion", "messages", "conversations", "text", "system",
    "tools", "choices",
]  # fmt: skip

Metric = Annotated[
    Literal["exact_match", "choices", "token_f1", "rouge_l"] | None,
    Field(description="metric for held-out answers; null: choices for items that have them, else exact_match"),
]
Task = Annotated[str, Field(min_length=1, description="name of the task; several sources may share one")]
Fields = Annotated[
    dict[FieldName, str],
    Field(description="the records' own names for known fields, such as {instruction: question, output: answer}"),
]


class FilesSource(Section):
    """Files of records or text: JSON (lines or an array), CSV, TSV, Parquet, Arrow, plain text; also compressed.

    A record's form is recognized by its fields: messages or conversations (chat), instruction and output (Alpaca),
    prompt and completion, or text.
    """

    type: Literal["files"] = Field(description="kind of source: files on this machine")
    task: Task
    path: UserPath = Field(description="file, pattern (data/*.jsonl.gz) or folder; relative to the working directory")
    format: Literal["json", "csv", "tsv", "parquet", "arrow", "text"] | None = Field(
        default=None, description="file format; null: by the file's ending"
    )
    sample_by: Literal["document", "paragraph", "line"] = Field(
        default="document", description="what one document is in plain text: the file, a paragraph or a line"
    )
    split: str | None = Field(
        default=None,
        min_length=1,
        description="read only the files named after this split, such as train or validation; null: all, unless they "
        "are named after several",
    )
    fields: Fields = Field(default_factory=dict)
    metric: Metric = None


class HubSource(Section):
    """A dataset on the Hugging Face Hub, streamed; preparing needs a network."""

    type: Literal["hub"] = Field(description="kind of source: a dataset on the Hugging Face Hub")
    task: Task
    name: str = Field(min_length=1, description="dataset id, such as tatsu-lab/alpaca")
    subset: str | None = Field(default=None, description="dataset configuration; null: the only or default one")
    split: str = Field(default="train", min_length=1, description="dataset split")
    revision: str | None = Field(default=None, description="commit, tag or branch; null: the latest commit")
    fields: Fields = Field(default_factory=dict)
    metric: Metric = None


class ReasoningGymSource(Section):
    """Questions with verifiable answers from one of reasoning-gym's seeded generators."""

    type: Literal["reasoning_gym"] = Field(description="kind of source: a reasoning-gym generator")
    task: Task
    generator: str = Field(min_length=1, description="generator name, such as basic_arithmetic")
    count: Rows = Field(description="number of documents to generate, including held-out ones")
    seed: int = Field(default=0, description="seed of the generator")
    options: dict[str, JsonValue] = Field(default_factory=dict, description="the generator's own options")
    prompt: str = Field(
        default=QUESTION,
        description="text of the user turn; {question} is replaced by the generator's question",
    )
    metric: Metric = None

    @field_validator("options")
    @classmethod
    def _options_leave_size_and_seed_alone(cls, options: dict[str, Any]) -> dict[str, Any]:
        for name, key in (("size", "count"), ("seed", "seed")):
            if name in options:
                raise ValueError(f"{name!r} is set by the source's own key `{key}`; remove it from options")
        return options

    @field_validator("prompt")
    @classmethod
    def _prompt_holds_the_question(cls, prompt: str) -> str:
        if QUESTION not in prompt:
            raise ValueError(f"{prompt!r} does not contain {QUESTION}, which stands for the question")
        return prompt


class SuiteSource(Section):
    """Rows of one of the suite's tasks, generated from packages with free licenses; see suite/SUITE.md."""

    type: Literal["suite"] = Field(description="kind of source: a task of the suite")
    task: str = Field(min_length=1, description="name of the suite's task, such as hypernyms")
    count: Rows = Field(description="number of documents to generate, including held-out ones")
    seed: int = Field(default=0, description="seed of the task's rows")
    metric: Metric = None


Source = Annotated[FilesSource | HubSource | ReasoningGymSource | SuiteSource, Field(discriminator="type")]


class CleaningConfig(Section):
    """Which documents are removed; removals are counted by reason and task."""

    duplicates: Literal["drop", "keep"] = Field(
        default="drop",
        description="copies within a task's training split: drop or keep; copies of held-out documents are always "
        "dropped",
    )
    near_duplicates: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="drop documents with at least this Jaccard similarity to an earlier one of their task (takes 6 KB "
        "of memory per document); null: off",
    )
    bad_rows: Literal["refuse", "drop"] = Field(
        default="refuse", description="rows that cannot be read: refuse (stop with an error), or drop and count them"
    )

    @model_validator(mode="after")
    def _near_duplicates_include_exact_ones(self) -> "CleaningConfig":
        if self.near_duplicates is not None and self.duplicates == "keep":
            raise ValueError("keeps duplicates but drops near duplicates; set one of the two otherwise")
        return self


class MixingConfig(Section):
    """How often each task's training documents are drawn; by default each document is drawn once."""

    weights: dict[str, Weight] = Field(
        default_factory=dict, description="relative share of the draws per task; must name every task"
    )
    temperature: PositiveFloat | None = Field(
        default=None,
        description="T in shares p_i ~ n_i^(1/T) for n_i documents of task i: 1 keeps proportions, large values make "
        "tasks equal",
    )
    caps: dict[str, PositiveInt] = Field(default_factory=dict, description="maximum number of documents used per task")
    epochs: Passes | None = Field(
        default=None,
        description="number of draws as a multiple of the training documents; null: 1, or set by token_budget",
    )
    token_budget: Annotated[PositiveInt, at_most(10**15)] | None = Field(
        default=None, description="number of draws as their total tokens, instead of epochs"
    )

    @model_validator(mode="after")
    def _one_rule_each(self) -> "MixingConfig":
        if self.weights and self.temperature is not None:
            raise ValueError("has both weights and temperature, which each set the shares; remove one")
        if self.token_budget is not None and self.epochs is not None:
            raise ValueError("has both epochs and token_budget, which each set the length; remove one")
        return self


class DataConfig(Section):
    """Everything that decides the content of a prepared set, apart from the tokenizer."""

    prepared_dir: UserPath = Field(description="folder of the prepared set, written by `teamlora prepare`")
    sources: list[Source] = Field(min_length=1, description="raw data; sources with the same task are merged")
    seq_len: Length = Field(description="maximum tokens per row")
    over_long: Literal["cut_right", "cut_left", "split", "drop"] = Field(
        default="cut_right",
        description="documents over seq_len tokens: keep the start (cut_right) or the end (cut_left), split, or drop",
    )
    held_out: float | int = Field(
        default=0.05,
        description="documents not used for training: a fraction in (0, 1), a count per task (1 or more), or 0: none",
    )
    seed: int = Field(default=0, description="seed of the held-out split and of the order of documents")
    system_prompt: str | None = Field(
        default=None,
        description="system message for conversations without one; null: the chat template's default",
    )
    chat_template: UserPath | None = Field(
        default=None, description="Jinja file to use instead of the tokenizer's chat template"
    )
    special_tokens_in_text: Literal["encode_as_text", "allow", "refuse"] = Field(
        default="encode_as_text",
        description="control tokens (the tokenizer's special tokens) within the data: encode as ordinary text, allow "
        "as control tokens, or refuse the row",
    )
    mask_history: bool = Field(default=False, description="learn only the last answer of each conversation")
    cleaning: CleaningConfig = Field(default_factory=CleaningConfig, description="which documents are removed")
    mixing: MixingConfig = Field(default_factory=MixingConfig, description="how often documents are drawn")

    @property
    def tasks(self) -> list[str]:
        """Task names in source order; a task id is an index into them."""
        return list(dict.fromkeys(source.task for source in self.sources))

    @property
    def metrics(self) -> dict[str, str | None]:
        """The metric of each task."""
        return {source.task: source.metric for source in self.sources}

    @field_validator("held_out", mode="before")
    @classmethod
    def _held_out_is_a_fraction_or_a_count(cls, value: Any) -> Any:
        if type(value) is float and value == 0:
            return 0
        is_count = type(value) is int and value >= 0
        is_fraction = type(value) is float and 0 < value < 1
        if not (is_count or is_fraction):
            raise ValueError(
                f"{value!r} is neither a fraction between 0 and 1 (such as 0.05) nor a whole number of documents per "
                "task (such as 100, or 0 to train on all)"
            )
        return value

    @model_validator(mode="after")
    def _one_metric_per_task(self) -> "DataConfig":
        for source in self.sources:
            if source.metric != self.metrics[source.task]:
                raise ValueError(
                    f"sources of task {source.task!r} have the metrics {source.metric} and "
                    f"{self.metrics[source.task]}; give all of them the same"
                )
        return self

    @model_validator(mode="after")
    def _mixing_names_the_tasks(self) -> "DataConfig":
        for key, named in (("weights", self.mixing.weights), ("caps", self.mixing.caps)):
            if unknown := sorted(set(named) - set(self.tasks)):
                raise ValueError(f"mixing.{key} names {unknown[0]!r}; the tasks are {', '.join(self.tasks)}")
        if self.mixing.weights and (missing := [task for task in self.tasks if task not in self.mixing.weights]):
            raise ValueError(f"mixing.weights has none for task {missing[0]!r}; give every task one")
        return self
