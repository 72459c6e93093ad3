"""The shortest recipe that is valid, as text."""

MINIMAL = """
run: {name: first}
base: {model: base}
data:
  prepared_dir: prepared
  seq_len: 256
  sources: [{type: files, task: sums, path: sums.jsonl}]
train: {steps: 10, global_batch_size: 8}
deepspeed: {config: ds_configs/zero3.json}
"""
