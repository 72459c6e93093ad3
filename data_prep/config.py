"""The recipe's `data` section: where raw data is, how it becomes rows, and where the prepared set lies.

Imports pydantic only, so that a recipe can be read and refused before anything heavy is imported.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

QUESTION = "{question}"


class Section(BaseModel):
    """One section of a recipe: unknown keys are errors, numbers finite, and nothing changes once validated."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class JsonlSource(Section):
    """A JSONL file in Alpaca form (instruction, input, output) or chat form (messages).

    The form is recognised by the file's first record and holds for the whole file.
    """

    type: Literal["jsonl"] = Field(description="kind of source: a JSONL file")
    task: str = Field(min_length=1, description="task the documents belong to; sources may share one")
    path: Path = Field(description="the file; a relative path counts from the working directory")


class ReasoningGymSource(Section):
    """Questions with checkable answers from one of reasoning-gym's seeded generators."""

    type: Literal["reasoning_gym"] = Field(description="kind of source: a reasoning-gym generator")
    task: str = Field(min_length=1, description="task the documents belong to; sources may share one")
    generator: str = Field(min_length=1, description="name of the generator, e.g. basic_arithmetic")
    count: int = Field(gt=0, description="documents to generate, held-out ones included")
    seed: int = Field(default=0, description="seed of the generator")
    options: dict[str, Any] = Field(default_factory=dict, description="the generator's own settings")
    prompt: str = Field(
        default=QUESTION,
        description="text of the user's turn; {question} stands for the generator's question",
    )

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


Source = Annotated[JsonlSource | ReasoningGymSource, Field(discriminator="type")]


class DataConfig(Section):
    """Everything that decides the content of a prepared set, apart from the tokenizer."""

    prepared_dir: Path = Field(description="folder of the prepared set; `teamlora prepare` writes it")
    sources: list[Source] = Field(min_length=1, description="raw data; sources of one task are merged")
    seq_len: int = Field(ge=2, description="most tokens a row; longer documents are cut on the right")
    held_out: float | int = Field(
        default=0.05,
        description="documents kept from training: a fraction in (0, 1), or a count per task (1 or more)",
    )
    seed: int = Field(default=0, description="seed of the held-out split and of the order of documents")
    system_prompt: str | None = Field(
        default=None,
        description="system message where a conversation has none; null leaves the chat template's default",
    )

    @field_validator("held_out", mode="before")
    @classmethod
    def _held_out_is_a_fraction_or_a_count(cls, value: Any) -> Any:
        is_count = type(value) is int and value >= 1
        is_fraction = type(value) is float and 0 < value < 1
        if not (is_count or is_fraction):
            raise ValueError(
                f"{value!r} is neither a fraction between 0 and 1 (such as 0.05) "
                "nor a whole number of documents per task (such as 100)"
            )
        return value
