"""What single templates do that others do not: ids, switches, marks, end tokens within turns, refusals, omissions."""

import json

import pytest

from data_prep.chat import ChatTemplate
from data_prep.omissions import omissions
from data_prep.user_error import UserError
from tests.data_prep.test_chat_templates import turns
from tests.data_prep.test_families import (
    CONVERSATIONS,
    SPECIALS,
    TEMPLATES,
    TOOLS,
    calls,
    learned,
    parts_of,
    result,
    template_of,
)
from tests.support.tiny_tokenizer import tiny_tokenizer


@pytest.mark.parametrize(
    ("ids", "results"),
    [(("123456789", "abcdefghi"), ("123456789", "abcdefghi")), (("call_1", "call_2"), ("call_2", "call_1")), ((), ())],
    ids=["nine", "mapped", "absent"],
)
def test_calls_and_results_share_ids_of_nine_characters(ids, results):
    given = [result(c, **({"tool_call_id": results[i]} if results else {})) for i, c in enumerate("56")]
    messages = [*turns("user: a"), calls({"x": 1}, {"x": 2}, ids=ids), *given, *turns("assistant: b")]
    text, spans = template_of("magistral").render(messages, "file.jsonl:7", TOOLS)
    called = [part.partition("[ARGS]")[0] for part in text.split("[CALL_ID]")[1:]]
    answered = [part.partition("[TOOL_CONTENT]")[0] for part in text.split("[TOOL_RESULTS]")[1:]]
    assert len({*called}) == 2 and all(len(each) == 9 and each.isalnum() for each in called)
    assert answered == (called if ids[:1] != ("call_1",) else called[::-1])
    if ids[:1] == ("123456789",):
        assert called == [*ids]
    first = f'[TOOL_CALLS]add[CALL_ID]{called[0]}[ARGS]{{"x": 1}}'
    second = f'[TOOL_CALLS]add[CALL_ID]{called[1]}[ARGS]{{"x": 2}}'
    assert [text[slice(*span)] for span in spans.values()] == [f"{first}{second}</s>", "b</s>"]


def test_magistral_writes_thoughts_between_markers_of_its_own():
    learned_texts = {kind: learned("magistral", CONVERSATIONS[kind]) for kind in ("single", "multi", "thinking")}
    assert learned_texts == {
        "single": ["b</s>"],
        "multi": ["b</s>", "d</s>"],
        "thinking": ["[THINK]hm[/THINK]b</s>"],
    }


@pytest.mark.parametrize("family", ["smollm3", "nemotron"])
def test_a_switch_in_the_system_turn_changes_what_the_prompt_holds(family):
    thought, end = {"smollm3": ("<think>\n\n</think>\n", "<|im_end|>"), "nemotron": ("", "\n<SPECIAL_12>")}[family]
    messages = turns("system: /no_think S", "user: a", "assistant: b", "user: c", "assistant: d")
    template = template_of(family)
    text, spans = template.render(messages, "file.jsonl:7")
    assert [text[slice(*span)] for span in spans.values()] == [f"b{end}", f"d{end}"]
    assert text.count(thought) >= 2 and "/no_think" not in text.replace("Mode: /no_think", "")
    text, spans = template.render([*messages[:2], calls({"x": 1}), result("5"), messages[4]], "file.jsonl:7", TOOLS)
    assert len(spans) == 2 and text[slice(*spans[4])] == f"d{end}"


def test_turns_before_the_first_question_are_found_though_their_prompt_is_refused():
    before = [*turns("system: S"), calls({"x": 1}), result("5"), *turns("assistant: b", "user: c", "assistant: d")]
    assert learned("qwen35", before) == [
        "<tool_call>\n<function=add>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call><|im_end|>",
        "b<|im_end|>",
        "\n</think>\n\nd<|im_end|>",
    ]


def test_the_analysis_before_a_call_is_learned_only_where_gpt_oss_writes_it():
    thought = {"reasoning_content": "hm", "thinking": "hm"}
    called = [*turns("user: a"), calls({"x": 1}, **thought), result("5")]
    first = ' to=functions.add<|channel|>commentary json<|message|>{"x": 1}<|call|>'
    second = ' to=functions.add<|channel|>commentary json<|message|>{"x": "<|call|>"}<|call|>'
    analysis = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
    assert learned("gpt_oss", called) == [analysis + first]
    assert learned("gpt_oss", [*called, calls({"x": "<|call|>"}, **thought)]) == [analysis + first, analysis + second]
    answered = [*called, calls({"x": "<|call|>"}, **thought), result("6"), *turns("assistant: b")]
    assert learned("gpt_oss", answered) == [first, second, "<|channel|>final<|message|>b<|return|>"]


def test_a_template_that_refuses_to_end_with_a_call_is_named_where_calls_end_with_a_token_of_their_own():
    text = (TEMPLATES / "gpt_oss.jinja").read_text()
    refusal = "{%- if messages[-1].tool_calls %}{{ raise_exception('Results are missing.') }}{% endif -%}"
    template = ChatTemplate(tiny_tokenizer(refusal + text, tuple(SPECIALS["gpt_oss"].split()), "<|return|>"))
    with pytest.raises(UserError) as caught:
        template.learned([*turns("user: a"), calls({"x": 1}), result("5"), *turns("assistant: b")], "file.jsonl:7")
    assert str(caught.value) == (
        "file.jsonl:7: where the turn of messages[1] ends cannot be seen: the tokenizer's chat template refuses the "
        "conversation up to there; mark what is learned with {% generation %} in a copy of the template under "
        "data.chat_template"
    )


def test_templates_that_leave_out_the_text_beside_calls_are_known():
    def leaves_out(family):
        messages = [*turns("user: a"), calls({"x": 1}, content="Aloud."), result("5"), *turns("assistant: b")]
        try:
            return "text beside calls" in omissions(*template_of(family).render(messages, "file.jsonl:7"), messages)
        except UserError:  # it writes no calls
            return None

    assert {family for family in [*SPECIALS, "qwen3", "llama3"] if leaves_out(family)} == {"command", "llama3"}


@pytest.mark.parametrize("family", ["gpt_oss", "glm4"])
def test_end_tokens_within_calls_and_answers_do_not_end_turns(family):
    end = {"gpt_oss": "<|call|>", "glm4": "<|observation|>"}[family]
    messages = [*turns("user: a"), calls({"x": f"{end} z"}), result(end), calls({"x": end}), *turns(f"user: {end}")]
    first, second = learned(family, messages)
    assert first.endswith(end) and first.count(end) == 2 and f"{end} z" in first
    assert second.count(end) == (2 if family == "gpt_oss" else 1)  # GLM's ends with <|user|> here


MARKED = (  # the user learns answers without their thoughts, ends included
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{{ '<think>' + (m.reasoning_content or '') + '</think>' }}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_only_what_the_template_marks_for_learning_is_learned():
    template = ChatTemplate(tiny_tokenizer(MARKED))
    messages = [*CONVERSATIONS["thinking"], *turns("user: c", "assistant: d")]
    assert parts_of(template.learned(messages, "file.jsonl:7")) == ["b<|im_end|>", "d<|im_end|>"]
    assert template.learned_ends() == ["<|im_end|>"]


def test_marks_find_answers_that_the_template_rewrites():
    template = ChatTemplate(
        tiny_tokenizer(MARKED.replace("m.content + '<|im_end|>' }}{% end", "m.content | upper }}{% end"))
    )
    messages = turns("user: a", "assistant: b", "user: c", "assistant: d")
    assert parts_of(template.learned(messages, "file.jsonl:7")) == ["B", "D"]
    assert template.learned_ends() == [""]  # the marks leave out what ends a turn


def test_the_last_turn_ends_with_the_next_marker_if_the_bases_generation_stops_there(tmp_path):
    specials = tuple(SPECIALS["glm4"].split())
    tokenizer = tiny_tokenizer((TEMPLATES / "glm4.jinja").read_text(), specials, specials[-1])
    stops = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|user|>", "<|observation|>"])
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    tokenizer.name_or_path = str(tmp_path)
    template = ChatTemplate(tokenizer)
    for kind, end in (("single", "b<|user|>"), ("tools", "</tool_call><|observation|>")):
        text, spans = template.render(CONVERSATIONS[kind], "file.jsonl:7")
        assert text.endswith(end) and [*spans.values()][-1][1] == len(text)
    assert template.learned_ends() == ["<|user|>", "<|observation|>"]


def test_a_template_that_does_not_write_tools_is_known():
    writes = {family: template_of(family).writes_tools() for family in SPECIALS}
    assert {family for family, does in writes.items() if not does} == {"deepseek_v3", "deepseek_r1", "gemma3", "phi4"}


def test_an_argument_that_the_template_leaves_out_is_refused():
    template = ChatTemplate(
        tiny_tokenizer(
            "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
            "{% for call in m.tool_calls or [] %}{{ call.function.name + call.function.arguments.city }}{% endfor %}"
            "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
        )
    )
    with pytest.raises(UserError, match=r"^file\.jsonl:7: .* leaves out argument 'city' of a call in messages\[1\]"):
        template.render([*turns("user: a"), calls({"city": "Oslo"})], "file.jsonl:7")
