"""How the time to render a conversation grows with its length: agent traces of 400 turns against 40."""

import statistics
import time

from transformers import PreTrainedTokenizerBase

from data_prep.chat import ChatTemplate

SHORT, LONG = 40, 400  # turns, of which every other one is a call and the rest are results
# Calls in ChatML, as several families write them: the sample base's own template has none.
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
    "{% for call in m.tool_calls or [] %}{{ '\n<tool_call>' + call.function | tojson + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def agent_trace(turns: int) -> list[dict]:
    """A question, calls and results by turns, and an answer."""
    messages = [{"role": "user", "content": "Look around."}]
    for index in range(turns // 2):
        call = {"type": "function", "function": {"name": "run", "arguments": {"command": f"ls {index}"}}}
        messages.append({"role": "assistant", "content": "I look on. " * 20, "tool_calls": [call]})
        messages.append({"role": "tool", "content": f"file {index}\n" * 40})
    return [*messages, {"role": "assistant", "content": "Done."}]


def long_over_short(tokenizer: PreTrainedTokenizerBase, repetitions: int = 9) -> float:
    """CPU seconds to render and label the long trace over those of the short one; median of the repetitions."""
    tokenizer.chat_template = TEMPLATE
    ratios = []
    for _ in range(repetitions):
        short, long = (_seconds(tokenizer, turns) for turns in (SHORT, LONG))
        ratios.append(long / short)
    return statistics.median(ratios)


def _seconds(tokenizer: PreTrainedTokenizerBase, turns: int) -> float:
    template, trace = ChatTemplate(tokenizer), agent_trace(turns)
    started = time.process_time()
    template.render(trace, "trace")
    return time.process_time() - started
