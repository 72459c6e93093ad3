"""The chat templates of eight model families, in essentials: which characters of a conversation are scored.

Expectations are texts written by hand, with ⟦ ⟧ around what is scored.
"""

import pytest

from data_prep.chat import ChatTemplate
from data_prep.user_error import UserError
from tests.support.tiny_tokenizer import CHATML_TEMPLATE, CHATML_TOKENS, tiny_tokenizer

SMOLLM2 = (CHATML_TEMPLATE, CHATML_TOKENS, "<|im_end|>")
LLAMA3 = (  # tools are in the first question, tool results are JSON, and a call's content is not written
    "{{ bos_token }}{% set ns = namespace(tools=tools) %}"
    "{% macro head(role) %}{{ '<|start_header_id|>' + role + '<|end_header_id|>\n\n' }}{% endmacro %}"
    "{% for m in messages %}{% if m.tool_calls %}"
    "{% if m.tool_calls | length > 1 %}{{ raise_exception('Only single tool-calls!') }}{% endif %}"
    "{% set call = m.tool_calls[0].function %}"
    "{{ head('assistant') + '{\"name\": \"' + call.name + '\", \"parameters\": ' + call.arguments | tojson + '}' }}"
    "{% elif m.role == 'tool' %}{{ head('ipython') + m.content | tojson }}"
    "{% elif m.role == 'user' and ns.tools %}"
    "{{ head('user') + 'Functions: ' + ns.tools | tojson + '\n' + m.content | trim }}{% set ns.tools = none %}"
    "{% else %}{{ head(m.role) + m.content | trim }}{% endif %}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ head('assistant') }}{% endif %}",
    ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "<|eot_id|>",
)
MISTRAL = (  # v0.3: the last turn, where it is a question, gets the system prompt; the last question gets the tools
    "{{ bos_token }}{% set system = messages[0].content if messages[0].role == 'system' else none %}"
    "{% set turns = messages[1:] if system else messages %}"
    "{% set questions = turns | selectattr('role', 'equalto', 'user') | list %}"
    "{% for m in turns %}{% if m.role == 'user' %}"
    "{% if tools is not none and m == questions[-1] %}"
    "{{ '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{{ '[INST] ' + (system + '\n\n' if system and loop.last else '') + m.content + '[/INST]' }}"
    "{% elif m.tool_calls %}{{ '[TOOL_CALLS] [' }}{% for call in m.tool_calls %}"
    "{% if call.id | length != 9 %}{{ raise_exception('Tool call IDs should have length 9!') }}{% endif %}"
    "{{ (call.function | tojson)[:-1] + ', \"id\": \"' + call.id + '\"}' + (']' if loop.last else ', ') }}{% endfor %}"
    "{{ eos_token }}{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}"
    "{% else %}{{ '[TOOL_RESULTS] {\"content\": ' + m.content + ', \"call_id\": \"' + m.tool_call_id + '\"}' }}"
    "{{ '[/TOOL_RESULTS]' }}{% endif %}{% endfor %}",
    ("<s>", "[INST]", "[/INST]", "</s>", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
     "[/TOOL_RESULTS]"),
    "</s>",
)  # fmt: skip
MISTRAL_FIRST = (MISTRAL[0].replace("system and loop.last", "system and loop.first"), *MISTRAL[1:])
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not\nsupported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    ("<bos>", "<start_of_turn>", "<end_of_turn>"),
    "<end_of_turn>",
)
QWEN3 = (  # drops reasoning before the last question; writes tool results as one user turn
    "{% if tools %}{{ '<|im_start|>system\n' }}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}"
    "{{ 'Tools:' }}{% for tool in tools %}{{ '\n' + tool | tojson }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% elif messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}"
    "{% endif %}{% set ns = namespace(question=-1) %}{% for m in messages %}{% if m.role == 'user' and not "
    "m.content.startswith('<tool_response>') %}{% set ns.question = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set content = m.content if m.content is string else '' %}"
    "{% if m.role == 'user' %}{{ '<|im_start|>user\n' + content + '<|im_end|>\n' }}"
    "{% elif m.role == 'assistant' %}{% set thought = m.reasoning_content or '' %}"
    "{% if '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > ns.question and (loop.last or thought) %}"
    "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{% endif %}{{ content }}"
    "{% for call in m.tool_calls or [] %}{% if content or not loop.first %}{{ '\n' }}{% endif %}"
    '{{ \'<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{ call.function.arguments | tojson + '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% elif m.role == 'tool' %}{% if loop.previtem.role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\n<tool_response>\n' + content + '\n</tool_response>' }}"
    "{% if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    (*CHATML_TOKENS, "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
    "<|im_end|>",
)
OPEN_THINKING = (  # the prompt expects an answer with reasoning; answers without are written differently
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and '<think>' not in m.content %}{{ '<think></think>' }}{% endif %}"
    "{{ m.content }}{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}",
    *SMOLLM2[1:],
)
PHI3 = (
    "{% for m in messages %}{% if m.role in ['system', 'user', 'assistant'] %}"
    "{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    "<|endoftext|>",
)
R1 = (  # drops what precedes </think> from every answer; the prompt opens a <think> block
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% else %}{{ '<|User|>' + m.content }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}",
    ("<bos>", "<|User|>", "<|Assistant|>", "<eos>"),
    "<eos>",
)
GPT_OSS = (  # only the last answer has its reasoning, in a separate message, and another end token
    "{% for m in messages %}{% if m.role == 'assistant' %}{% if m.thinking and loop.last %}"
    "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}"
    "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}",
    ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"),
    "<|return|>",
)
REMINDING = (  # the system prompt is written after every question
    "{{ bos_token }}{% for m in messages[1:] %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + m.content + ' ' + messages[0].content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
    *MISTRAL[1:],
)
THOUGHTFUL = {"role": "assistant", "reasoning_content": "r"}
REASONED = {"role": "assistant", "reasoning_content": "<|im_end|>\n<<turn:0>>"}


def turns(*texts: str) -> list[dict]:
    """Messages from texts such as "user: Hi"."""
    return [dict(zip(("role", "content"), text.split(": ", 1), strict=True)) for text in texts]


def marked(style, messages, tools=None) -> str:
    """The conversation's text with ⟦ ⟧ around its spans, once their tokens are seen to decode to what they hold."""
    tokenizer = tiny_tokenizer(*style)
    text, spans = ChatTemplate(tokenizer).render(messages, "file.jsonl:7", tools)
    assert list(spans) == [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    scored = [
        token
        for token, (first, end) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True)
        if any(first < span[1] and end > span[0] for span in spans.values())
    ]
    assert tokenizer.decode(scored) == "".join(text[start:end] for start, end in spans.values())
    for start, end in reversed(spans.values()):
        text = f"{text[:start]}⟦{text[start:end]}⟧{text[end:]}"
    return text


@pytest.mark.parametrize(
    ("style", "messages", "expected"),
    [
        (SMOLLM2, turns("user: Hi", "assistant: 4 words"),
         "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
         "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦4 words<|im_end|>⟧\n"),
        (SMOLLM2, turns("system: S", "user: a", "assistant: b", "tool: 5", "assistant: c "),
         "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦b<|im_end|>⟧\n"
         "<|im_start|>tool\n5<|im_end|>\n<|im_start|>assistant\n⟦c <|im_end|>⟧\n"),
        (LLAMA3, turns("user:  b a ", "assistant: \n a b\n"),
         "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nb a<|eot_id|>"
         "<|start_header_id|>assistant<|end_header_id|>\n\n⟦a b<|eot_id|>⟧"),
        (LLAMA3, turns("system: S\n", "user: a", "assistant: b", "user: c", "assistant: d"),
         "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
         "<|start_header_id|>user<|end_header_id|>\n\na<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
         "⟦b<|eot_id|>⟧<|start_header_id|>user<|end_header_id|>\n\nc<|eot_id|>"
         "<|start_header_id|>assistant<|end_header_id|>\n\n⟦d<|eot_id|>⟧"),
        (MISTRAL, turns("user: a", "assistant: b "), "<s>[INST] a[/INST]⟦ b</s>⟧"),
        (MISTRAL, turns("user: a", "assistant: b", "user: c", "assistant: </s>[INST] d"),
         "<s>[INST] a[/INST]⟦ b</s>⟧[INST] c[/INST]⟦ </s>[INST] d</s>⟧"),
        (MISTRAL, turns("system: S", "user: a", "assistant: b", "user: c"),
         "<s>[INST] a[/INST]⟦ b</s>⟧[INST] S\n\nc[/INST]"),
        (MISTRAL_FIRST, turns("system: S", "user: a", "assistant: b", "user: c", "assistant: d"),
         "<s>[INST] S\n\na[/INST]⟦ b</s>⟧[INST] c[/INST]⟦ d</s>⟧"),
        (REMINDING, turns("system: S", "user: a", "assistant: b", "user: c", "assistant: d"),
         "<s>[INST] a S[/INST]⟦ b</s>⟧[INST] c S[/INST]⟦ d</s>⟧"),
        (GEMMA, turns("user: b a ", "assistant:  a"),
         "<bos><start_of_turn>user\nb a<end_of_turn>\n<start_of_turn>model\n⟦a<end_of_turn>⟧\n"),
        (GEMMA, turns("user: a<end_of_turn>\n<start_of_turn>model\nb ",
                      "assistant:  a<end_of_turn>\n<start_of_turn>user\nb ", "user: c", "assistant: d"),
         "<bos><start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\nb<end_of_turn>\n<start_of_turn>model\n"
         "⟦a<end_of_turn>\n<start_of_turn>user\nb<end_of_turn>⟧\n<start_of_turn>user\nc<end_of_turn>\n"
         "<start_of_turn>model\n⟦d<end_of_turn>⟧\n"),
        (QWEN3, turns("user: a", "assistant: <think>\nhm\n</think>\n\nb"),
         "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦<think>\nhm\n</think>\n\nb<|im_end|>⟧\n"),
        (QWEN3, turns("system: S", "user: a", "assistant: <think>\nhm\n</think>\n\nb", "user: c", "assistant: d"),
         "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦b<|im_end|>⟧\n"
         "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nd<|im_end|>⟧\n"),
        (QWEN3, [*turns("user: a"), {**REASONED, "content": "b"}, *turns("user: c"), {**REASONED, "content": "d"}],
         "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦b<|im_end|>⟧\n<|im_start|>user\nc<|im_end|>\n"
         "<|im_start|>assistant\n⟦<think>\n<|im_end|>\n<<turn:0>>\n</think>\n\nd<|im_end|>⟧\n"),
        (QWEN3, turns("user: a", "assistant: <think>r</think>b<|im_end|>\n<|im_start|>user\nc", "user: c",
                      "assistant: d"),
         "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦b<|im_end|>\n<|im_start|>user\nc<|im_end|>⟧\n"
         "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nd<|im_end|>⟧\n"),
        (OPEN_THINKING, turns("user: a", "assistant: b", "user: c", "assistant: <think>\nr</think>d<|im_end|>"),
         "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think></think>⟦b<|im_end|>⟧\n"
         "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n<think>\n⟦r</think>d<|im_end|><|im_end|>⟧\n"),
        (R1, turns("user: a", "assistant: <think>\nr\n</think>\n\nb", "user: c", "assistant: d"),
         "<bos><|User|>a<|Assistant|>⟦\n\nb<eos>⟧<|User|>c<|Assistant|>⟦d<eos>⟧"),
        (GPT_OSS, [*turns("user: a"), {**THOUGHTFUL, "content": "b"}, *turns("user: c"),
                   {**THOUGHTFUL, "content": "d"}],
         "<|start|>user<|message|>a<|end|><|start|>assistant⟦<|channel|>final<|message|>b<|end|>⟧"
         "<|start|>user<|message|>c<|end|><|start|>assistant⟦<|channel|>analysis<|message|>r<|end|>"
         "<|start|>assistant<|channel|>final<|message|>d<|return|>⟧"),
        (PHI3, turns("user: a", "assistant: b"), "<|user|>\na<|end|>\n<|assistant|>\n⟦b<|end|>⟧\n<|endoftext|>"),
        (PHI3, turns("system: S", "user: a", "assistant: b", "user: c", "assistant: d"),
         "<|system|>\nS<|end|>\n<|user|>\na<|end|>\n<|assistant|>\n⟦b<|end|>⟧\n<|user|>\nc<|end|>\n<|assistant|>\n"
         "⟦d<|end|>⟧\n<|endoftext|>"),
    ],
    ids=["smollm2", "smollm2 system, tool as a turn", "llama3", "llama3 system", "mistral", "mistral turns",
         "mistral system in the last turn", "mistral system in the first turn", "system in every turn", "gemma",
         "gemma turns", "qwen3", "qwen3 system", "qwen3 reasoning apart", "qwen3 rewrites what looks like turns",
         "prompt opens a thought", "r1", "gpt-oss", "phi3", "phi3 system"],
)  # fmt: skip
def test_every_familys_answers_are_found(style, messages, expected):
    assert marked(style, messages) == expected


@pytest.mark.parametrize("style", [SMOLLM2, LLAMA3, MISTRAL, GEMMA, QWEN3, PHI3])
@pytest.mark.parametrize("answer", ["", "<<turn:1>>", "<<turn:0>> ⟪<<turn:3>>"], ids=["empty", "marker", "markers"])
def test_contents_may_be_empty_or_look_like_markers(style, answer):
    start, end = "" if style is not MISTRAL else " ", "<|end|>" if style is PHI3 else style[2]
    lead = "<think>\n\n</think>\n\n" if style is QWEN3 else start
    text = marked(style, turns("user: <<turn:1>>", f"assistant: {answer}", "user: ", f"assistant: {answer}"))
    assert f"⟦{start}{answer}{end}⟧" in text and f"⟦{lead}{answer}{end}⟧" in text and text.count("⟦") == 2


@pytest.mark.parametrize(
    ("style", "messages", "message"),
    [
        (GEMMA, turns("system: S", "user: a", "assistant: b"),
         r"refuses turns of system, user, assistant: System role not supported; correct the conversation"),
        (MISTRAL, turns("system: S", "user: a", "assistant: b"),
         r"leaves out messages\[0\] \(system\) of this conversation; remove the turn or correct the template"),
        (GEMMA, turns("user: a", "assistant: b", "tool: 5", "assistant: c"),
         r"refuses turns of user, assistant, tool, assistant: Conversation roles must alternate; correct"),
        (PHI3, turns("user: a", "assistant: b", "tool: 5", "assistant: c"), r"leaves out messages\[2\] \(tool\)"),
        (R1, turns("user: a", "assistant: <think>\nr\n</think>\n\nb"),
         r"leaves out the reasoning of messages\[1\], the last answer; name one that writes it under data\.chat_temp"),
        (R1, [*turns("user: a"), {**REASONED, "content": "b"}, *turns("user: c")], r"leaves out the reasoning of mess"),
        (LLAMA3, [*turns("user: a"), {**REASONED, "content": "b"}],
         r"leaves out the reasoning of messages\[1\], the last answer; .* or remove the reasoning from the record$"),
        (QWEN3, turns("user: a", "assistant: lost <think>r</think>b"), r"leaves out the reasoning of messages\[1\]"),
    ],
    ids=["gemma system", "mistral system", "gemma tool", "phi3 tool", "r1 reasoning", "r1 reasoning apart",
         "llama3 reasoning", "qwen3 words before reasoning"],
)  # fmt: skip
def test_what_a_family_cannot_write_is_refused_in_one_line(style, messages, message):
    with pytest.raises(UserError, match=rf"^file\.jsonl:7: the tokenizer's chat template {message}") as caught:
        marked(style, messages)
    assert "\n" not in str(caught.value)


QWEN3_PROMPT = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("style", "answer", "expected"),
    [
        (QWEN3, None, QWEN3_PROMPT + "<think>\n\n</think>\n\n"),
        (QWEN3, {"role": "assistant", "content": "b"}, QWEN3_PROMPT + "<think>\n\n</think>\n\n"),
        (QWEN3, {"role": "assistant", "content": "<think>\nr\n</think>\n\nb"}, QWEN3_PROMPT),
        (QWEN3, {**REASONED, "content": "b"}, QWEN3_PROMPT),
        (GPT_OSS, None, "<|start|>user<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>"),
        (GPT_OSS, {**THOUGHTFUL, "content": "b"}, "<|start|>user<|message|>a<|end|><|start|>assistant"),
        (R1, None, "<bos><|User|>a<|Assistant|>"),
        (OPEN_THINKING, None, QWEN3_PROMPT + "<think></think>"),
        (OPEN_THINKING, {"role": "assistant", "content": "<think>\nr</think>b"}, QWEN3_PROMPT + "<think>\n"),
        (MISTRAL, None, "<s>[INST] a[/INST] "),
        (PHI3, None, "<|user|>\na<|end|>\n<|assistant|>\n"),
    ],
)
def test_a_prompt_is_what_training_writes_before_the_answer(style, answer, expected):
    template, question = ChatTemplate(tiny_tokenizer(*style)), turns("user: a")
    assert template.prompt(question, "file.jsonl:7", answer=answer) == expected
    written, _ = template.render([*question, answer or {"role": "assistant", "content": "b"}], "file.jsonl:7")
    assert written.startswith(expected)
