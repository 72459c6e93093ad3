"""Training on our base against the usual path: from_pretrained with bitsandbytes' own 4-bit linears."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.support.tiny_models import tiny_llama
from trainer.base.loader import load_base

IDS = torch.arange(3, 51).view(4, 12)


def losses_of_five_steps(base: torch.nn.Module) -> list[str]:
    """The printed losses of a LoRA trained on the base in fp32."""
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["up_proj", "q_proj"], task_type="CAUSAL_LM"))
    model.train()  # bitsandbytes repacks its weights in eval mode on some CPUs
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found = []
    for _ in range(5):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(f"{loss.item():.5f}")
    return found


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_losses_equal_the_usual_path_to_every_printed_digit(tmp_path, base_of, tie):
    # rows of whole blocks: with others bitsandbytes' own CPU kernel reads wrong maxima
    folder = tiny_llama(tmp_path, tie=tie, intermediate_size=128)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    usual = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.float32)
    ours = load_base(base_of(folder, quantization="nf4"), "cpu")
    assert losses_of_five_steps(ours) == losses_of_five_steps(usual)
