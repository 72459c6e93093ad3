"""Analyzes the routers of a finished run on its held-out documents: plots, numbers, tokens, and each expert alone."""

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from data_prep.encode import IGNORED
from data_prep.publish import blame_option, publish_atomically
from data_prep.reader import open_prepared
from data_prep.user_error import UserError
from trainer.adapters.router_observer import find_experts, observe_routers, only_expert
from trainer.adapters.router_stats import by_decoder_layer
from trainer.analysis.document_scores import Document, Scores, first_documents, score
from trainer.analysis.router_usage import RouterUsageCollector
from trainer.analysis.router_view import RouterView, as_json, only_expert_name, save_plots, tables
from trainer.analysis.tokens_page import Example, tokens_page
from trainer.evaluation.loaded_models import LoadedRun, load_run
from trainer.objective.batches import collate, move
from trainer.objective.packed_forward import packed_forward
from trainer.run import run_dir

FOLDER = "router"
NUMBERS = "router.json"
TOKENS = "tokens.html"


def show_routers(directory: Path, items_per_task: int, examples: int, to: Path | None) -> str:
    """Analyzes the run on the first held-out documents of each task. Writes a folder; returns tables and its path.

    Raises UserError if there is no finished run, it has no router or no held-out documents, or the folder is taken.
    """
    recipe = run_dir.open_run(directory)
    if recipe.adapter.method == "lora":
        raise UserError(f"{directory}: adapter.method=lora has no router; give a run of teamlora, moelora or hydralora")
    target = to or directory / FOLDER
    _check_target(target)
    run = load_run(directory)
    prepared = open_prepared(run.recipe.data, run.tokenizer)
    documents = first_documents(prepared.held_out, len(prepared.tasks), items_per_task)
    if not documents:
        raise UserError(
            f"data.held_out={recipe.data.held_out}: no held-out document of {recipe.data.prepared_dir} has labelled "
            "tokens, so there is nothing to run the routers on; prepare with a larger data.held_out"
        )
    with blame_option("--to", target), publish_atomically(target) as folder:
        view = measure_routers(run, documents, prepared.tasks)
        page = _page(directory, run, _pick_examples(documents, examples), prepared.tasks)
        (folder / NUMBERS).write_text(json.dumps(as_json(view), indent=1) + "\n", encoding="utf-8")
        (folder / TOKENS).write_text(page, encoding="utf-8")
        save_plots(view, folder)
    return f"{tables(view, directory)}\n\nwritten         {target}"


def measure_routers(run: LoadedRun, documents: Sequence[Document], tasks: list[str]) -> RouterView:
    """Runs the documents with the learned weights, without the adapter, and with each expert alone."""
    model = run.model
    adapters = find_experts(model)
    collector = RouterUsageCollector(list(adapters.values()), len(tasks))
    with observe_routers(model, collector.observe):
        learned = score(model, documents, on_batch=collector.begin_batch)
    scores = {"base": _score_within(model.disable_adapter(), run, documents), "learned": learned}
    for expert in range(len(next(iter(adapters.values())).experts)):
        scores[only_expert_name(expert)] = _score_within(only_expert(model, expert), run, documents)
    matrices: list[Tensor] = [module.interaction for module in adapters.values() if module.interaction is not None]
    return RouterView(
        method=run.recipe.adapter.method,
        tasks=tasks,
        names=list(adapters),
        document_tasks=np.array([document["task_ids"][0] for document in documents]),
        usage=collector.usage(),
        interaction=torch.stack(matrices).detach().float().cpu() if matrices else None,
        scores=scores,
    )


def _score_within(context: AbstractContextManager, run: LoadedRun, documents: Sequence[Document]) -> Scores:
    with context:
        return score(run.model, documents)


def _pick_examples(documents: Sequence[Document], count: int) -> list[Document]:
    """The first document of each task, then the second of each, ..., `count` in all, grouped by task."""
    seen: dict[int, int] = {}
    ranks = []  # (number within its task, task) per document
    for document in documents:
        task = int(document["task_ids"][0])
        seen[task] = seen.get(task, 0) + 1
        ranks.append((seen[task], task))
    chosen = sorted(range(len(documents)), key=lambda i: ranks[i])[:count]
    return [documents[i] for i in sorted(chosen, key=lambda i: ranks[i][::-1])]


def _page(directory: Path, run: LoadedRun, documents: Sequence[Document], tasks: Sequence[str]) -> str:
    names = list(find_experts(run.model))
    examples, layers = [], []
    for document in documents:
        by_layer = by_decoder_layer(names, _omega(run, document, len(names)))
        layers = list(by_layer)
        means = torch.stack(list(by_layer.values()))
        examples.append(
            Example(
                task=tasks[int(document["task_ids"][0])],
                texts=token_texts(run.tokenizer, document["input_ids"].tolist()),
                learned=document["labels"] != IGNORED,
                weights=torch.cat((means.mean(0, keepdim=True), means)).numpy(),
            )
        )
    return tokens_page(f"Leading experts of {directory}", examples, ["all layers", *(f"layer {i}" for i in layers)])


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """The text that each token adds. A token that ends within a character adds none; the next one adds all of it.

    Tokens are decoded together with those before them, since some tokenizers drop the space before the first token.
    """
    texts, start, shown = [], 0, 0
    for end in range(1, len(ids) + 1):
        before, now = (cast(str, tokenizer.decode(ids[start:stop])) for stop in (shown, end))
        if now.endswith("\ufffd") and end < len(ids):
            texts.append("")
        else:
            texts.append(now[len(before) :])
            start, shown = shown, end
    return texts


@torch.no_grad()
def _omega(run: LoadedRun, document: Document, linears: int) -> Tensor:
    """omega of one document, [linears, tokens, k]."""
    by_linear: list[Tensor] = [torch.empty(0)] * linears

    def keep(index: int, _phi: Tensor, omega: Tensor) -> None:
        by_linear[index] = omega[0].cpu()

    batch = move(collate([document]), run.model.device)
    with observe_routers(run.model, keep):
        packed_forward(run.model, batch)()
    return torch.stack(by_linear)


def _check_target(target: Path) -> None:
    """Only a folder that this command has written may be replaced."""
    if target.exists() and not (target / NUMBERS).is_file():
        raise UserError(f"--to: {target} exists and was not written by this command; give another folder or remove it")
