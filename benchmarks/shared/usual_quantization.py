"""The usual 4-bit base that both comparisons run against: bitsandbytes' NF4 through transformers."""

from transformers import BitsAndBytesConfig


def usual_quantization() -> BitsAndBytesConfig:
    """NF4 with double quantisation, stored in bf16 containers so that ZeRO-3 can shard it."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype="bfloat16",
        bnb_4bit_quant_storage="bfloat16",
    )
