"""Exports a tiny TeamLoRA run as a LoRA and merged, beside what our versions compute with them; see old_readers.sh.

python -m tests.support.write_exports FOLDER
"""

import json
import sys
from pathlib import Path

from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoTokenizer

from tests.support.finished_run import finish_run, prepare_tasks
from tests.support.read_exports import TURNS
from tests.support.tiny_adapters import logits, plain_model
from trainer.base.model_config import load_tokenizer
from trainer.export.export import ExportRequest, export

# Not the default of transformers 4, so that a setting which it does not find shows.
ROPE = {"rope_type": "default", "rope_theta": 500.0}
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def main(folder: Path) -> None:
    (folder / "template.jinja").write_text(TEMPLATE)
    run = finish_run(prepare_tasks(folder, rope_parameters=ROPE), folder / "run")
    for to in ("lora", "merged"):
        print(export(ExportRequest(run.folder, to, folder / to)))
    models = {
        "lora": PeftModel.from_pretrained(plain_model(run.base), folder / "lora").eval(),
        "merged": plain_model(folder / "merged").eval(),
    }
    save_file({to: logits(model).detach() for to, model in models.items()}, folder / "logits.safetensors")
    tokenizer = load_tokenizer(run.recipe.base, run.recipe.data.chat_template)
    assert AutoTokenizer.from_pretrained(run.base).chat_template != tokenizer.chat_template
    prompt = tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True)
    encoded = tokenizer(prompt, return_tensors="pt")
    answer = models["merged"].generate(**encoded, max_new_tokens=8, do_sample=False)[0]
    facts = {"prompt": prompt, "ids": encoded["input_ids"][0].tolist(), "answer": answer.tolist()}
    (folder / "expected.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
