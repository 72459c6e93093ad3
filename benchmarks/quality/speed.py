"""Time of a training step, a prefill and a decoded token under each method, over LoRA of rank r_A, in one run.

    python -m benchmarks.quality.speed [BASE]

One model a method, on the CPU, in one process of one thread. Repetitions run every method once, in random order; a
ratio a repetition, of CPU time. A step is what the trainer computes (loss over labelled tokens, backward, AdamW) on two
rows of the suite, without DeepSpeed around it. MoELoRA's loop is the published form (tests/support/adapted_layer.py).
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from benchmarks.quality import results
from benchmarks.quality.prepared import prepare_for
from benchmarks.quality.settings import EXPERTS, TOTAL_RANK, TRAINED, Cell, recipe_of
from data_prep.reader import open_prepared
from data_prep.user_error import UserError
from tests.support.adapted_layer import MoeLoraLoop
from trainer.adapters.attach import attach_adapter
from trainer.adapters.layer import freeze_experts
from trainer.adapters.router_observer import find_experts
from trainer.adapters.router_stats import RouterStats
from trainer.base.loader import load_base
from trainer.base.model_config import load_tokenizer
from trainer.objective.batches import Batch, collate, count_tokens
from trainer.objective.loss import LabelledLoss
from trainer.recipe import Recipe

DEFAULT_BASE = "bases/smollm2-135m-instruct"
LOOP = "moelora_loop"
PROMPT, NEW_TOKENS = 256, 16
KINDS = ("step", "prefill", "decode")


class WithLoop(nn.Module):
    """A frozen linear under the published MoELoRA loop."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.loop = MoeLoraLoop(base.in_features, base.out_features, TOTAL_RANK // EXPERTS).to(base.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, seq, d_in] -> [batch, seq, d_out]"""
        y = self.base(x)
        return self.loop(x.flatten(0, -2), y.flatten(0, -2)).view_as(y)


class Side:
    """One method's model with what is timed of it."""

    def __init__(self, method: str, recipe: Recipe, batch: Batch, num_tasks: int) -> None:
        torch.manual_seed(0)
        base = load_base(recipe.base, "cpu")
        model = (
            with_loops(base, recipe.adapter.target_modules) if method == LOOP else attach_adapter(base, recipe.adapter)
        )
        self.model, self.batch = model, batch
        self.router_stats = RouterStats(model, num_tasks)
        self.loss = LabelledLoss(model, self.router_stats, num_tasks).train()
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        self.labelled, self.tokens = count_tokens([batch])
        self.cache = None

    def step(self) -> None:
        self.model.train()
        self.router_stats.begin_step(self.tokens, measure=False)
        self.router_stats.begin_micro_batch(self.batch["task_ids"])
        loss, _ = self.loss(self.batch, self.labelled, 1.0)
        loss.backward()
        self.router_stats.end_micro_batch()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def prefill(self) -> None:
        """PROMPT tokens into the cache, which `decode` goes on from."""
        self.model.eval()
        prompt = self.batch["input_ids"][:1, :PROMPT]
        self.cache = self.model(input_ids=prompt, use_cache=True, logits_to_keep=1).past_key_values

    @torch.no_grad()
    def decode(self) -> None:
        """NEW_TOKENS tokens, one after another."""
        for token in self.batch["input_ids"][0, :NEW_TOKENS]:
            self.model(input_ids=token.view(1, 1), past_key_values=self.cache, use_cache=True)


def with_loops(base: nn.Module, targets: Sequence[str]) -> nn.Module:
    base.requires_grad_(False)
    for name, linear in list(base.named_modules()):
        parent, _, last = name.rpartition(".")
        if last in targets:
            setattr(base.get_submodule(parent), last, WithLoop(linear))
    return base


def sides_of(base: str) -> dict[str, Side]:
    """By method, all on the same rows."""
    recipes = {method: recipe_of(Cell(method, 0, 1e-3), base) for method in TRAINED}
    recipes[LOOP] = recipes["moelora"]
    recipe = recipes["teamlora"]
    prepared = open_prepared(recipe.data, load_tokenizer(recipe.base, recipe.data.chat_template))
    batch = collate([prepared.train[i] for i in range(recipe.train.micro_batch_size)])
    return {method: Side(method, of, batch, len(prepared.tasks)) for method, of in recipes.items()}


def measure(sides: dict[str, Side], seconds: float) -> dict[str, dict[str, list[float]]]:
    """By method and kind, the time of each repetition; two at least, which quartiles need."""
    times = {method: {kind: [] for kind in KINDS} for method in sides}
    order, shuffled = list(sides), random.Random(0)
    for method in order:
        timed(sides[method])
    ending = time.monotonic() + seconds
    while len(times["lora"]["step"]) < 2 or time.monotonic() < ending:
        shuffled.shuffle(order)
        for method in order:
            for kind, taken in timed(sides[method]).items():
                times[method][kind].append(taken)
    return times


def timed(side: Side) -> dict[str, float]:
    found = {"step": seconds(side.step)}
    with served(side.model):
        return found | {"prefill": seconds(side.prefill), "decode": seconds(side.decode)}


def seconds(work: Callable[[], None]) -> float:
    """Of the processor."""
    started = time.process_time()
    work()
    return time.process_time() - started


@contextmanager
def served(model: nn.Module) -> Iterator[None]:
    """Within, the adapters are as `teamlora generate` and `evaluate` have them, quicker for few tokens."""
    freeze_experts(model)
    try:
        yield
    finally:
        for adapter in find_experts(model).values():
            adapter.frozen = None


def ratios(ours: dict[str, list[float]], theirs: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """By kind, median and quartiles of the ratio of each repetition."""
    found = {}
    for kind in KINDS:
        each = [a / b for a, b in zip(ours[kind], theirs[kind], strict=True)]
        low, middle, high = (round(value, 4) for value in statistics.quantiles(each, n=4))
        found[kind] = {"median": middle, "low": low, "high": high}
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", default=DEFAULT_BASE, help="folder of a causal LM; default: the sample base")
    parser.add_argument("--seconds", type=float, default=300.0, help="of repetitions (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        made = results.provenance(threads=1)
        prepare_for(Cell("teamlora", 0, 1e-3), options.base)
        sides = sides_of(options.base)
    except (results.MixedResults, UserError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    times = measure(sides, options.seconds)
    over_lora = {method: ratios(mine, times["lora"]) for method, mine in times.items()}
    seconds = {
        method: {kind: round(statistics.median(mine[kind]), 4) for kind in KINDS} for method, mine in times.items()
    }
    repetitions = len(times["lora"]["step"])
    over_loop = ratios(times["teamlora"], times[LOOP])
    found = {"over_lora": over_lora, "teamlora_over_moelora_loop": over_loop, "seconds": seconds, "made": made}
    results.save_speed({**found, "repetitions": repetitions})
    print(f"{repetitions} repetitions; seconds, and times over LoRA of rank {TOTAL_RANK}: median (quartiles)\n")
    for method in times:
        told = [
            f"{seconds[method][kind]:7.3f} {of['median']:.3f} ({of['low']:.3f}-{of['high']:.3f})"
            for kind, of in over_lora[method].items()
        ]
        print(f"{method:18} {'   '.join(told)}")
    print(json.dumps({f"teamlora_over_moelora_loop_{kind}": of["median"] for kind, of in over_loop.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
