"""The routers of a finished run, seen on its held-out documents: pictures, numbers, tokens, and each expert alone."""

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

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
from trainer.analysis.router_usage import RouterWatch
from trainer.analysis.router_view import RouterView, alone_name, as_json, draw, tables
from trainer.analysis.tokens_page import Example, tokens_page
from trainer.evaluation.loaded_models import LoadedRun, load_run
from trainer.objective.batches import collate
from trainer.run import run_dir

FOLDER = "router"
NUMBERS = "router.json"
TOKENS = "tokens.html"


def show_routers(directory: Path, items_per_task: int, examples: int, to: Path | None) -> str:
    """Watches the run on the first held-out documents of each task; writes a folder, and returns tables and its name.

    Raises UserError where there is no finished run, it has no router or no held-out documents, or the folder is taken.
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
            f"data.held_out={recipe.data.held_out}: no held-out document of {recipe.data.prepared_dir} has anything to "
            "learn, so there is nothing to show the routers; prepare with a larger data.held_out"
        )
    with blame_option("--to", target), publish_atomically(target) as folder:
        view = watch(run, documents, prepared.tasks)
        shown = _in_turn(documents, examples)
        (folder / NUMBERS).write_text(json.dumps(as_json(view), indent=1) + "\n")
        (folder / TOKENS).write_text(_page(directory, run, shown, prepared.tasks), encoding="utf-8")
        draw(view, folder)
    return f"{tables(view, directory)}\n\nwritten         {target}"


def watch(run: LoadedRun, documents: Sequence[Document], tasks: list[str]) -> RouterView:
    """Runs the documents under the learned weights, without the adapter, and under each expert alone."""
    model = run.model
    adapters = find_experts(model)
    watcher = RouterWatch(list(adapters.values()), len(tasks))
    with observe_routers(model, watcher.see):
        learned = score(model, documents, before=watcher.begin)
    scores = {"base": _scored(run, documents, model.disable_adapter()), "learned": learned}
    first = next(iter(adapters.values()))
    scores |= {alone_name(i): _scored(run, documents, only_expert(model, i)) for i in range(len(first.experts))}
    matrices = [module.interaction for module in adapters.values()]
    return RouterView(
        method=run.recipe.adapter.method,
        tasks=tasks,
        names=list(adapters),
        document_tasks=np.array([document["task_ids"][0] for document in documents]),
        use=watcher.use(),
        interaction=None if matrices[0] is None else torch.stack(matrices).detach().float().cpu(),
        scores=scores,
    )


def _scored(run: LoadedRun, documents: Sequence[Document], changed: AbstractContextManager) -> Scores:
    with changed:
        return score(run.model, documents)


def _in_turn(documents: Sequence[Document], count: int) -> list[Document]:
    """The first document of each task, then the second of each, ..., `count` in all, put together by task."""
    seen: dict[int, int] = {}
    turns = []
    for document in documents:
        task = int(document["task_ids"][0])
        seen[task] = seen.get(task, 0) + 1
        turns.append((seen[task], task))
    chosen = sorted(range(len(documents)), key=lambda i: turns[i])[:count]
    return [documents[i] for i in sorted(chosen, key=lambda i: turns[i][::-1])]


def _page(directory: Path, run: LoadedRun, documents: Sequence[Document], tasks: Sequence[str]) -> str:
    names = list(find_experts(run.model))
    examples, layers = [], []
    for document in documents:
        by_layer = by_decoder_layer(names, _weights(run, document, len(names)))
        layers = list(by_layer)
        means = torch.stack(list(by_layer.values()))
        examples.append(
            Example(
                task=tasks[int(document["task_ids"][0])],
                texts=texts_of(run.tokenizer, document["input_ids"].tolist()),
                learnt=document["labels"] != IGNORED,
                weights=torch.cat((means.mean(0, keepdim=True), means)).numpy(),
            )
        )
    return tokens_page(f"Leading experts of {directory}", examples, ["all layers", *(f"layer {i}" for i in layers)])


def texts_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text; nothing, where it ends within a character: that is then the next one's.

    Decoded together with those shown last, since some tokenizers drop the blank before the first token.
    """
    texts, start, shown = [], 0, 0
    for end in range(1, len(ids) + 1):
        before, now = tokenizer.decode(ids[start:shown]), tokenizer.decode(ids[start:end])
        if now.endswith("\ufffd") and end < len(ids):
            texts.append("")
        else:
            texts.append(now[len(before) :])
            start, shown = shown, end
    return texts


@torch.no_grad()
def _weights(run: LoadedRun, document: Document, linears: int) -> Tensor:
    """omega of one document, [linears, tokens, k]."""
    found: list[Tensor] = [torch.empty(0)] * linears

    def see(index: int, _phi: Tensor, omega: Tensor) -> None:
        found[index] = omega[0].cpu()

    batch = {name: tensor.to(run.model.device) for name, tensor in collate([document]).items()}
    with observe_routers(run.model, see):
        run.model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    return torch.stack(found)


def _check_target(target: Path) -> None:
    """What this command has written may be replaced, nothing else."""
    if target.exists() and not (target / NUMBERS).is_file():
        raise UserError(f"--to: {target} exists and is no folder of this command; give another or remove it")
