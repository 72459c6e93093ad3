"""The turns of a conversation: roles, contents, tool calls, and which turns are learned."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any

from data_prep.content_parts import answer_of, read_parts, turns_of
from data_prep.documents import Message
from data_prep.fields import TOOLS, Fields, Spellings, folded, refuse_media
from data_prep.tool_calls import in_order_of_calls, read_calls, read_tools
from data_prep.user_error import UserError
from data_prep.values import decoded, is_blank, kind_of, parsed, refuse_surrogates, text_of

_PLAIN_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_CALL = "tool_call"  # a turn whose content is a tool call, or a list of them
_ROLES = {
    "system": ("system", "developer", "sys"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "model", "bot", "chatbot", "ai", "llm"),
    "tool": (
        "tool", "tool_response", "tool_responses", "tool_result", "tool_results", "tool_output",
        "tool_outputs", "function", "function_response", "function_responses", "function_result", "function_results",
        "function_output", "function_outputs", "observation", "observations", "environment", "ipython",
    ),
    _CALL: (_CALL, "tool_calls", "function_call", "function_calls"),
}  # fmt: skip
_ROLE_OF = Spellings(_ROLES)
_MEANINGS = Spellings(
    {
        "role": ("role", "from"),
        "content": ("content", "value"),
        "tool_calls": ("tool_calls", "tool_call", "function_call", "function_calls"),
        "tool_call_id": ("tool_call_id", "call_id", "tool_use_id"),
        "name": ("name", "tool_name", "function_name"),
        "reasoning": ("reasoning_content", "thinking", "reasoning"),  # as in transformers
        "tools": TOOLS,
        "learned": (  # true or 1: the turn is learned
            "weight", "loss", "train", "trainable", "training", "trained", "is_trainable", "learn", "learned",
            "learnable", "loss_weight", "loss_mask", "compute_loss",
        ),
        "masked": ("mask", "masked", "is_masked"),  # true or 1: it is not
    }
)  # fmt: skip
_LIKE_A_FLAG = re.compile("loss|train|learn|mask|weight|supervis")  # whatever the field holds
_LEAVES_OUT = re.compile("ignore|skip|exclu|omit|drop|delet|discard|frozen|freez|hidden|prefix|prefill")  # if true
_PUTS_IN = re.compile("inclu|keep|kept|enabl|active|backprop|requiresgrad|finetun|target")  # leaves out if false
_FLAGS = {"true": 1, "yes": 1, "on": 1, "1": 1, "1.0": 1, "false": 0, "no": 0, "off": 0, "0": 0, "0.0": 0}


@dataclass(slots=True)
class Turn:
    """One turn as it was read."""

    message: Message
    where: str
    learned: bool | None = None  # what its flags say; None: nothing
    is_call: bool = False  # a turn of its own for calls, which belong to the answer before it
    tools: list[dict[str, Any]] | None = None
    unread: set[str] = field(default_factory=set)  # names of its fields that are not read


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns as chat templates expect them, and what else they say."""

    messages: list[Message]
    given: frozenset[int]  # indices of the answers that are not learned
    tools: list[dict[str, Any]] | None
    unread: set[str]


def read_turns(value: Any, where: str) -> list[Turn]:
    """Turns in OpenAI's, ShareGPT's or ms-swift's spelling. Raises UserError for anything else."""
    value = parsed(value)
    if not isinstance(value, list) or not value:
        raise UserError(f"{where} is {kind_of(value)}; expected a list of one or more turns, correct the record")
    return [read for index, turn in enumerate(value) for read in _read_turn(parsed(turn), f"{where}[{index}]")]


def refuse_unlearned(record: Mapping[str, Any], where: str) -> None:
    """Raises UserError for a record whose own flag, such as `train: false`, says that nothing of it is learned."""
    for name, value in record.items():
        if (meaning := _MEANINGS.meaning(name)) not in ("learned", "masked"):
            continue
        flags = parsed(value)
        what, flags = ("turns are", flags) if isinstance(flags, list) else ("the record is", [flags])
        if (0 if meaning == "learned" else 1) in map(_sign, flags):
            raise UserError(
                f"{where}: field `{name}` is {value!r}, which may say that {what} not learned; remove the record "
                "(data.cleaning.bad_rows: drop leaves it out), or rename the field"
            )


def exchange(question: str, answer: str) -> list[Turn]:
    """A question and its answer."""
    return [Turn({"role": "user", "content": question}, ""), Turn({"role": "assistant", "content": answer}, "")]


def conversation(turns: Sequence[Turn], tools: list[dict[str, Any]] | None = None) -> Conversation:
    """Puts turns together: calls with their answer, results in the order of calls. tools: those of the record.

    Raises UserError for results of unknown calls, and for tools that differ or come after an answer.
    """
    joined: list[Turn] = []
    for turn in turns:
        if turn.is_call and joined and _may_join(joined[-1], turn):
            before = joined[-1].message
            calls = [*before.get("tool_calls", ()), *turn.message["tool_calls"]]
            joined[-1] = replace(joined[-1], message={**before, "tool_calls": calls})
        else:
            joined.append(turn)
    messages = in_order_of_calls([turn.message for turn in joined], [turn.where for turn in joined])
    given = frozenset(index for index, turn in enumerate(joined) if turn.learned is False)
    return Conversation(messages, given, _tools(turns, tools), set().union(*(turn.unread for turn in turns)))


def _may_join(answer: Turn, call: Turn) -> bool:
    is_only_a_call = call.message.keys() == {"role", "tool_calls"}
    return answer.message["role"] == "assistant" and is_only_a_call and answer.learned == call.learned


def _tools(turns: Sequence[Turn], tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    """The tools of the record or of a turn before the first answer; others must equal them."""
    answered = False
    for turn in turns:
        answered = answered or turn.message["role"] == "assistant"
        if turn.tools is not None and turn.tools != tools:
            if answered or tools is not None:
                raise UserError(
                    f"{turn.where}: has tools that the conversation does not begin with; expected one list of tools "
                    "for all turns, in the record's `tools`"
                )
            tools = turn.tools
    return tools


def _read_turn(turn: Any, where: str) -> list[Turn]:
    """A turn; several if it holds results, which are turns of their own."""
    if not isinstance(turn, dict):
        raise UserError(f"{where} is {kind_of(turn)}; expected an object with `role` and `content`")
    role_field, content_field = ("from", "value") if "from" in turn else ("role", "content")
    content = turn.get(content_field)
    if len(turn) == 2 and isinstance(content, str) and (role := _PLAIN_ROLES.get(str(turn.get(role_field)))):
        refuse_surrogates(content, content_field, where)  # most turns are like this; it saves time
        return [Turn({"role": role, "content": content}, where)]
    return _read_any_turn({name: value for name, value in turn.items() if value is not None}, where)


def _read_any_turn(turn: dict[str, Any], where: str) -> list[Turn]:
    fields = Fields(turn, _MEANINGS, where)
    usual_role, usual_content = ("from", "value") if "from" in turn else ("role", "content")
    role_field = fields.take("role") or usual_role
    content_field = fields.take("content") or usual_content
    refuse_media(turn, where)
    role = _role(text_of(turn, role_field, where), where)
    read = Turn({"role": "assistant" if role == _CALL else role}, where, is_call=role == _CALL)
    message = read.message
    if read.is_call and content_field in turn:
        message["tool_calls"] = read_calls(turn[content_field], where, read.unread)
    else:
        fields.remove(*(name for name in fields.spelt("tool_calls") if is_blank(turn[name])))
        if calls := fields.take("tool_calls"):
            message["tool_calls"] = _calls_of(fields, calls, role, read.unread)
    further: list[Message] = []
    if "tool_calls" not in message or (content_field in turn and not read.is_call):
        further = _add_content(turn, content_field, read)
    for meaning in ("tool_call_id", "name") if role == "tool" else ("tool_call_id",):
        if name := fields.take(meaning):
            _add({meaning: text_of(turn, name, where)}, read)
    if message["role"] == "assistant" and (name := fields.take("reasoning")):
        _add({"reasoning_content": text_of(turn, name, where)}, read)
    read.tools = read_tools(fields)
    read.learned = _learned(fields, read)
    read.unread |= {f"field {name} of turns" for name in fields.left}
    return [read, *(Turn(other, where) for other in further)]


def _role(spelt: str, where: str) -> str:
    role = _ROLE_OF.meaning(spelt)
    if role is None:
        known = ", ".join(name for names in _ROLES.values() for name in names)
        raise UserError(
            f"{where}: role {spelt!r} is unknown; expected one of {known}: rename the role, or write what it says into "
            "a turn of one of these"
        )
    return role


def _calls_of(fields: Fields, name: str, role: str, unread: set[str]) -> list[dict[str, Any]]:
    if role not in ("assistant", _CALL):
        raise UserError(f"{fields.where}: field `{name}` on a turn of {role}; expected calls on assistant turns only")
    return read_calls(fields.values[name], fields.where, unread)


def _add_content(turn: dict[str, Any], name: str, read: Turn) -> list[Message]:
    """Adds the content of a turn, a text or a list of parts. Returns the further turns in it, which are results."""
    content = turn.get(name)
    if not isinstance(content, list) or not content:
        read.message["content"] = text_of(turn, name, read.where)
        return []
    parts = read_parts(content, name, read.where, read.unread)
    if read.message["role"] == "assistant":
        _add(answer_of(parts, read.where), read)
        return []
    first, *further = turns_of(parts, read.message["role"], read.where)
    read.message.update(first)
    return further


def _add(said: Message, read: Turn) -> None:
    """Adds fields to a turn. Raises UserError where it has them with other values, as parts of its content."""
    for name, value in said.items():
        if read.message.setdefault(name, value) != value:
            raise UserError(
                f"{read.where}: `{name}` differs between the turn and the parts of its content; keep one of the two"
            )


def _learned(fields: Fields, turn: Turn) -> bool | None:
    """What the flags of a turn say; only answers can be learned.

    Raises UserError for flags that contradict each other, and for what may be a flag but has no certain meaning.
    """
    names = {name: True for name in fields.spelt("learned")} | {name: False for name in fields.spelt("masked")}
    said = {name: _flag(fields, name, sense) for name, sense in names.items()}
    fields.remove(*said)
    if turn.message["role"] != "assistant":
        turn.unread |= {f"flag {name} of {turn.message['role']} turns" for name, learned in said.items() if learned}
        return None
    if uncertain := [name for name in fields.left if _may_be_a_flag(name, fields.values[name])]:
        raise UserError(
            f"{fields.where}: field `{uncertain[0]}` may say what is learned; expected `weight`, 0 (not learned) or 1, "
            "rename or remove it"
        )
    if len({*said.values()}) > 1:
        first, other = next((a, b) for a in said for b in said if said[a] != said[b])
        raise UserError(f"{fields.where}: fields `{first}` and `{other}` contradict each other; remove one")
    return next(iter(said.values()), None)


def _flag(fields: Fields, name: str, sense: bool) -> bool:
    """Whether a flag says that its turn is learned. sense: what it says when it is true."""
    sign = _sign(fields.values[name])
    if sign not in (0, 1):
        expected = "0 (not learned) or 1" if sense else "1 (not learned) or 0"
        raise UserError(f"{fields.where}: field `{name}` is {fields.values[name]!r}; expected {expected}, correct it")
    return bool(sign) is sense


def _sign(value: Any) -> bool | int | float | Decimal | None:
    """The number in a flag, 0 for false and 1 for true; None for what is neither. Tables store all values as texts."""
    value = decoded(value)
    value = _FLAGS.get(value.strip().lower()) if isinstance(value, str) else value
    return value if isinstance(value, bool | int | float | Decimal) else None


def _may_be_a_flag(name: str, value: Any) -> bool:
    """Whether a field of an answer may say that it is not learned, by its name or by its name and value."""
    spelt, sign = folded(name), _sign(value)
    doubtful = (_LEAVES_OUT.search(spelt) and sign == 1) or (_PUTS_IN.search(spelt) and sign == 0)
    return bool(_LIKE_A_FLAG.search(spelt) or doubtful)
