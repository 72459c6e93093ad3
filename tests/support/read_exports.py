"""Opens the exports of write_exports with whatever transformers and PEFT run this, and compares; see old_readers.sh.

python tests/support/read_exports.py FOLDER, in an environment without this project
"""

import json
import sys
from pathlib import Path

TURNS = [{"role": "user", "content": "Sort the words , please"}]
TOLERANCE = 1e-4


def main(folder: Path) -> int:
    import peft
    import torch
    import transformers
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"transformers {transformers.__version__}, peft {peft.__version__}, torch {torch.__version__}")
    base = AutoModelForCausalLM.from_pretrained(folder / "base", rope_theta=500.0)  # transformers 5 saved it
    models = {
        "merged": AutoModelForCausalLM.from_pretrained(folder / "merged").eval(),
        "lora": peft.PeftModel.from_pretrained(base, folder / "lora").eval(),
    }
    expected, facts = load_file(folder / "logits.safetensors"), json.loads((folder / "expected.json").read_text())
    right = True
    for to, model in models.items():
        with torch.no_grad():
            found = model(input_ids=torch.arange(3, 27).view(2, 12)).logits
        off = (found - expected[to]).abs().max().item()
        tokenizer = AutoTokenizer.from_pretrained(folder / to)
        prompt = tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True)
        same = prompt == facts["prompt"] and tokenizer(prompt).input_ids == facts["ids"]
        decoded = tokenizer.decode(facts["ids"]) == prompt
        print(f"{to}: logits differ by at most {off:.1e}; prompt {same}, decoded {decoded}")
        right = right and off <= TOLERANCE and same and decoded
    encoded = tokenizer(prompt, return_tensors="pt")
    answer = models["merged"].generate(**encoded, max_new_tokens=8, do_sample=False)[0].tolist()
    print(f"merged: generates {answer[len(facts['ids']) :]}, expected {facts['answer'][len(facts['ids']) :]}")
    return 0 if right and answer == facts["answer"] else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
