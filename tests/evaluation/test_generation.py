"""Which items are asked, what a model is given of each, and where its answers end."""

import pytest
import torch
from transformers import GenerationConfig

from data_prep.chat import ChatTemplate
from data_prep.config import DataConfig
from tests.data_prep.test_chat_templates import QWEN3
from tests.support.tiny_models import tiny_llama
from tests.support.tiny_tokenizer import CHATML_TEMPLATE, tiny_tokenizer
from trainer.base.loader import load_base
from trainer.evaluation.generation import config_end_ids, generate_greedy, template_end_ids
from trainer.evaluation.runner import build_questions, sample_per_task
from trainer.recipe import BaseModelConfig

# As Qwen3's template: an empty reasoning block before the last answer, which the generation prompt does not hold.
THINKING = CHATML_TEMPLATE.replace(
    "+ message['content'] +",
    "+ ('<think>\n\n</think>\n\n' if loop.last and message['role'] == 'assistant' else '') + message['content'] +",
)
# As DeepSeek-R1-Distill's: the generation prompt opens a thought that is not written with an answer.
OPENED = CHATML_TEMPLATE.replace("assistant\n' }}", "assistant\n<think>\n' }}")
SPACED = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
LONG = 60  # tokens
PROMPTS = {
    CHATML_TEMPLATE: "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nword<|im_end|>\n<|im_start|>assistant\n",
    SPACED: "system: S<|im_end|>user: word<|im_end|>assistant:",
}
PROMPTS[OPENED] = PROMPTS[CHATML_TEMPLATE]
PROMPTS[THINKING] = PROMPTS[CHATML_TEMPLATE] + "<think>\n\n</think>\n\n"


def item(choices=("word", "letter")) -> dict:
    turns = [{"role": "system", "content": "S"}, {"role": "user", "content": "word"}]
    return {"task": "t", "messages": turns, "answer": choices[0], "choices": list(choices)}


# As Qwen3.5's: records may switch reasoning off, and answers then follow an empty block.
SWITCHED = CHATML_TEMPLATE.replace(
    "+ message['content'] +",
    "+ ('<think>\n\n</think>\n\n' if enable_thinking is false and message['role'] == 'assistant' else '')"
    " + message['content'] +",
).replace("assistant\n' }}", "assistant\n' + ('<think>\n\n</think>\n\n' if enable_thinking is false else '') }}")


def test_an_item_is_asked_with_its_own_settings_of_the_template():
    tokenizer = tiny_tokenizer(SWITCHED)
    items = [item(), {**item(), "chat_template_kwargs": {"enable_thinking": False}}]
    asked = build_questions(items, tokenizer, data_config())
    expected = [PROMPTS[CHATML_TEMPLATE], PROMPTS[THINKING]]
    assert [tokenizer.decode(prompt) for prompt in asked.prompts] == expected
    for prompt, reference, (first, _) in zip(expected, asked.references, asked.choices, strict=True):
        assert tokenizer.decode(reference.ids) == prompt + "word<|im_end|>"
        assert tokenizer.decode(reference.ids[reference.start :]) == "word<|im_end|>"
        assert tokenizer.decode(first.ids) == prompt + "word"


def data_config() -> DataConfig:
    source = {"type": "files", "task": "t", "path": "unused"}
    return DataConfig(prepared_dir="unused", sources=[source], seq_len=512)


@pytest.mark.parametrize("template", PROMPTS)
def test_an_answer_and_each_choice_stand_where_training_puts_them(template):
    tokenizer = tiny_tokenizer(template)
    asked = build_questions([item()], tokenizer, data_config())
    (prompt,), (wanted,), (choices,) = asked.prompts, asked.references, asked.choices
    assert tokenizer.decode(prompt) == PROMPTS[template]
    blank = " " if template == SPACED else ""
    for text, choice in zip(choices, item()["choices"], strict=True):
        assert text.ids[: text.start] == prompt
        assert tokenizer.decode(text.ids[text.start :]) == blank + choice
    trained = tokenizer.decode(wanted.ids)  # encoded as for training: in it the answer follows the prompt, and the end
    assert trained == PROMPTS[template] + blank + "word<|im_end|>"
    assert wanted.ids[: len(choices[0].ids)] == choices[0].ids
    assert asked.end_ids == [tokenizer.convert_tokens_to_ids("<|im_end|>")]


@pytest.mark.parametrize(
    "wanted", [{"answer": "<think>\nletter\n</think>\n\nword"}, {"answer": "word", "reasoning_content": "letter"}]
)
def test_reasoning_is_asked_for_and_scored_as_it_is_learnt_and_choices_stand_where_there_is_none(wanted):
    tokenizer = tiny_tokenizer(*QWEN3)
    asked = build_questions([{**item(), **wanted}], tokenizer, data_config())
    before = PROMPTS[CHATML_TEMPLATE]
    assert tokenizer.decode(asked.prompts[0]) == before
    learned = asked.references[0]
    assert tokenizer.decode(learned.ids[: learned.start]) == before
    assert tokenizer.decode(learned.ids[learned.start :]) == "<think>\nletter\n</think>\n\nword<|im_end|>"
    for text, choice in zip(asked.choices[0], item()["choices"], strict=True):
        assert tokenizer.decode(text.ids) == PROMPTS[THINKING] + choice


def test_an_answer_ends_where_the_template_ends_it_whatever_the_base_names(run, items):
    prompt = run.tokenizer("Sort these words", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        first = run.model(input_ids=torch.tensor([prompt])).logits[0, -1].argmax().item()
    assert first not in config_end_ids(run.model)
    (whole,) = generate_greedy(run.model, run.tokenizer, [prompt], 8)
    (ended,) = generate_greedy(run.model, run.tokenizer, [prompt], 8, end_ids=[first])
    assert ended == run.tokenizer.decode([first], skip_special_tokens=True) != whole


def test_greedy_is_the_likeliest_token_whatever_penalties_the_base_comes_with(tmp_path):
    tiny_llama(tmp_path)
    penalty = GenerationConfig(repetition_penalty=5.0, temperature=0.5, do_sample=True, eos_token_id=[2, 7])
    penalty.save_pretrained(tmp_path)
    model = load_base(BaseModelConfig(model=str(tmp_path), quantization="none", dtype="fp32"), "cpu")
    assert config_end_ids(model) == [2, 7]
    ids = [3, 4, 5]
    (text,) = generate_greedy(model, tiny_tokenizer(), [ids], LONG)
    for _ in range(LONG):
        ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
    assert text == tiny_tokenizer().decode(ids[3:], skip_special_tokens=True)
    assert len(set(ids[3:])) < LONG  # which a penalty would have avoided


def test_without_an_end_token_of_the_templates_an_answer_ends_with_the_tokenizers():
    tokenizer = tiny_tokenizer("{% for m in messages %}{{ m['role'] + ':' + m['content'] }}{% endfor %}")
    assert template_end_ids(tokenizer, ChatTemplate(tokenizer)) == [tokenizer.eos_token_id]


@pytest.mark.parametrize(
    ("count", "kept"), [(1, [0]), (2, [0, 4]), (3, [0, 3, 5]), (7, list(range(7))), (9, list(range(7)))]
)
def test_some_items_of_each_task_are_evenly_spread_and_in_order(count, kept):
    made = [{"task": task, "number": number} for number in range(7) for task in ("a", "b")]
    found = sample_per_task(made, count)
    assert [i["number"] for i in found if i["task"] == "a"] == [i["number"] for i in found if i["task"] == "b"] == kept
    assert found == [i for i in made if i["number"] in kept]
