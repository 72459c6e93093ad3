"""Options of `teamlora launch`: key=value words for the launch itself, beside those for the recipe."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    StrictBool,
    ValidationError,
    model_validator,
)

from data_prep.user_error import UserError
from data_prep.user_path import UserPath, expand_home
from trainer.console.arguments import LAST_PORT


def _true_or_false(text: Any) -> Any:
    return {"true": True, "false": False}.get(text, text)


class LaunchOptions(BaseModel):
    """What a launch was asked for. Descriptions say what each value is expected to be."""

    model_config = ConfigDict(frozen=True)

    arguments: tuple[str, ...] = Field(description="path of the recipe and its overrides, passed on to the ranks")
    hostfile: UserPath | None = Field(None, description="a file with a line `name slots=N` per node")
    num_gpus: PositiveInt | None = Field(None, description="a whole number of at least 1")
    master_port: Annotated[int, Field(ge=1, le=LAST_PORT)] | None = Field(
        None, description=f"a whole number from 1 to {LAST_PORT}"
    )
    retries: NonNegativeInt = Field(0, description="a whole number of at least 0")
    min_nodes: PositiveInt | None = Field(None, description="a whole number of at least 1")
    check: Annotated[StrictBool, BeforeValidator(_true_or_false)] = Field(True, description="true or false")

    @model_validator(mode="after")
    def _belong_together(self) -> "LaunchOptions":
        if self.hostfile is not None and self.num_gpus is not None:
            raise ValueError(f"num_gpus={self.num_gpus}: expected the hostfile's slots alone; remove num_gpus")
        if self.min_nodes is not None and self.hostfile is None:
            raise ValueError(f"min_nodes={self.min_nodes}: expected hostfile=FILE with it; add it, or remove min_nodes")
        return self

    @property
    def recipe(self) -> Path:
        """Path of the recipe. Raises UserError unless exactly one is given."""
        paths = [argument for argument in self.arguments if "=" not in argument]
        if len(paths) != 1:
            raise UserError(f"arguments {' '.join(paths)!r}: expected the path of one recipe; see `teamlora recipes`")
        return expand_home(Path(paths[0]))

    @property
    def overrides(self) -> list[str]:
        """The recipe's values to replace, as key.path=value."""
        return [argument for argument in self.arguments if "=" in argument]


def parse_launch_options(words: Sequence[str]) -> LaunchOptions:
    """Separates the launch's own key=value words from the recipe's. Raises UserError for a bad value."""
    own: dict[str, str] = {}
    arguments = []
    for word in words:
        key, equals, value = word.partition("=")
        if equals and key in LaunchOptions.model_fields and key != "arguments":
            own[key] = value
        else:
            arguments.append(word)
    try:
        return LaunchOptions.model_validate({"arguments": arguments, **own})
    except ValidationError as error:
        raise UserError(_one_line(error)) from None


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    if not first["loc"]:  # options that contradict each other
        return str(first["ctx"]["error"])
    key = str(first["loc"][0])
    return f"{key}={first['input']}: expected {LaunchOptions.model_fields[key].description}; change it"
