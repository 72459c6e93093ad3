"""A tokenizer small enough to train on the spot: nothing is read from a disk or a network."""

from transformers import PreTrainedTokenizerFast

# The template of SmolLM2-135M-Instruct: ChatML, with a system message of its own where the conversation has none.
CHATML_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

_TEXT = (
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    "system user assistant",
    "What is the sum of these numbers? The answer is the number of letters in the word.",
    "Sort the words from a to z and give the answer only.",
)


def tiny_tokenizer(
    chat_template: str = CHATML_TEMPLATE,
    special_tokens: tuple[str, ...] = CHATML_TOKENS,
    end: str = "<|im_end|>",
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of under 512 tokens that takes any text; pad equals eos equals `end`.

    `special_tokens` get the ids 0, 1, 2, ... in their order; the first is bos.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=511,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=special_tokens[0], eos_token=end, pad_token=end
    )
    fast.chat_template = chat_template
    return fast
