"""Long conversations: rendered as often as short ones, whatever the template, so that time grows with their turns."""

from pathlib import Path

import pytest

from data_prep.chat import ChatTemplate
from data_prep.template_renderer import TemplateRenderer
from data_prep.tool_calls import in_order_of_calls
from tests.data_prep.test_chat_templates import LLAMA3, MISTRAL, QWEN3, SMOLLM2
from tests.data_prep.test_chat_tools import HERMES, OPEN_END, TOOLS, call, calls, result
from tests.support.tiny_tokenizer import tiny_tokenizer

TEMPLATES = Path(__file__).parent / "templates"
# Without the family's special tokens: the turns of its calls end in ordinary text.
FOREIGN = {
    path.stem: (path.read_text(), *SMOLLM2[1:])
    for path in sorted(TEMPLATES.glob("*.jinja"))
    if path.stem not in ("gemma3", "phi4")  # which take no calls
}
STYLES = {"qwen3": QWEN3, "hermes": HERMES, "open end": OPEN_END, "llama3": LLAMA3, "mistral": MISTRAL}


def with_calls(rounds: int) -> list[dict]:
    return [
        message
        for i in range(rounds)
        for message in (
            {"role": "user", "content": f"add {i}"},
            calls(call(x=i), content=""),
            result(f"{i}!"),
            {"role": "assistant", "content": f"it is {i}"},
        )
    ]


@pytest.mark.parametrize("style", [*STYLES.values(), *FOREIGN.values()], ids=[*STYLES, *FOREIGN])
def test_a_conversation_with_calls_is_rendered_as_often_whatever_its_length(style, monkeypatch):
    rendered: list[int] = []
    write = TemplateRenderer.text

    def counted(self, messages, *given, **named):
        rendered.append(len(messages))
        return write(self, messages, *given, **named)

    monkeypatch.setattr(TemplateRenderer, "text", counted)
    counts = []
    for rounds in (8, 32):
        template = ChatTemplate(tiny_tokenizer(*style))
        rendered.clear()
        _, spans = template.render(with_calls(rounds), "file.jsonl:7", TOOLS)
        assert [*spans] == [index for index in range(4 * rounds) if index % 2]
        counts.append(len(rendered))
    assert counts[1] == counts[0]


def test_answers_after_calls_of_a_kind_end_alike_with_a_token_or_without():
    """Each span is what the turn is without the others: rounds do not lend each other their ends."""
    template = ChatTemplate(tiny_tokenizer(*FOREIGN["glm4"]))
    text, spans = template.render(with_calls(3), "file.jsonl:7", TOOLS)
    turns = [text[slice(*span)] for span in spans.values()]
    assert [turn.replace(str(i // 2), "N") for i, turn in enumerate(turns)][:4] == [
        turn.replace("0", "N") for turn in turns[:2]
    ] * 2


def test_results_are_put_in_the_order_of_their_calls_unless_one_is_of_an_earlier_turn():
    made = [{**call(), "id": name} for name in "abc"]
    before = [calls({**call(), "id": "x"}), {**result("x"), "tool_call_id": "x"}, calls(*made)]

    def order(names: str) -> list[str]:
        turns = [*before, *({**result(name), "tool_call_id": name} for name in names)]
        return [message["content"] for message in in_order_of_calls(turns, [*map(str, range(len(turns)))])[3:]]

    assert order("cba") == ["a", "b", "c"]
    assert order("cxba") == ["c", "x", "b", "a"]
