"""Maps the tensors of a model's files to its parameters, on meta, and refuses what does not fit before it is read."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from data_prep.user_error import UserError
from trainer.base.base_fingerprint import fingerprint
from trainer.base.document_isolation import check_document_isolation
from trainer.base.model_config import parse_config
from trainer.base.model_folder import resolve_folder
from trainer.base.safetensors_reader import READABLE, Weights

if TYPE_CHECKING:
    from trainer.recipe import BaseModelConfig

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
NAMES_SHOWN = 3


@dataclass(frozen=True)
class OpenedBase:
    """A base that can be loaded: its model on meta, its files, and {name in the files: name in the model}.

    unplaced: names in the files of tensors that the model's class does not know, such as heads that predict several
    tokens (MTP). They are not loaded.
    """

    base: "BaseModelConfig"
    model: PreTrainedModel
    weights: Weights
    names: dict[str, str]
    fingerprint: str
    unplaced: tuple[str, ...] = ()


def open_base(base: "BaseModelConfig") -> OpenedBase:
    """Builds the model on meta and matches it with its files; everything that can be refused is refused here.

    Needs no process group and allocates no weights; run it before either. On a Hub id it fetches the model.

    Raises:
        UserError: folder missing or no model; pickled, already quantised or damaged weights, or ones that do
            not match the configuration; unknown architecture or no causal LM; attention that is missing here
            or does not isolate packed documents; with nf4, matrices of the decoder outside linear layers.
    """
    config = parse_config(base)
    model = skeleton(config, base)
    weights = Weights(resolve_folder(base))
    names, unplaced = match_names(model, weights)
    check_document_isolation(config, base.attention, base.trust_remote_code)
    return OpenedBase(base, model, weights, names, fingerprint(weights.folder), unplaced)


def describe_unplaced(opened: OpenedBase) -> str:
    """How many tensors the model's class does not know, and the first of them."""
    shown = ", ".join(opened.unplaced[:NAMES_SHOWN])
    more = ", ..." if len(opened.unplaced) > NAMES_SHOWN else ""
    return f"{len(opened.unplaced)} tensors that {type(opened.model).__name__} does not know ({shown}{more})"


def skeleton(config: PretrainedConfig, base: "BaseModelConfig") -> PreTrainedModel:
    """The model of `config` with parameters on meta and buffers real, nothing quantised yet."""
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
                config,
                dtype=DTYPES[base.dtype],
                attn_implementation=base.attention,
                trust_remote_code=base.trust_remote_code,
            )
    except Exception as error:  # transformers raises of many kinds for a config that makes no model
        raise UserError(
            f"base.model: transformers cannot build {config.model_type} with base.attention={base.attention} "
            f"({' '.join(str(error).split())[:200]}); set another attention or another model"
        ) from error
    if base.quantization == "nf4":
        _refuse_unknown_matrices(model)
    # what PEFT writes into an adapter's configuration: of a Hub id, not this machine's copy of it
    model.name_or_path = model.config._name_or_path = base.model
    return model


def match_names(model: PreTrainedModel, weights: Weights) -> tuple[dict[str, str], tuple[str, ...]]:
    """Which tensor of the files goes to which parameter or buffer: {name in the files: name in the model}.

    Then the names in the files that have no place in the model, apart from rotary frequencies, which it computes.
    Names go through transformers' own conversion table, so far as it only renames. Checks that every
    parameter finds its tensor, with its shape and in a readable dtype.
    """
    table = get_model_conversion_mapping(model)
    renamings = [entry for entry in table if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in table if isinstance(entry, WeightConverter)]
    slots = model.state_dict()
    names: dict[str, str] = {}
    for source in weights.names:
        target, merged = rename_source_key(source, renamings, converters, model.base_model_prefix, slots)
        if merged is not None:
            raise UserError(
                f"base.model: {model.config.model_type} merges tensors while loading ({source}); such bases, "
                "mostly mixtures of experts, are not supported: choose a dense model"
            )
        if target in slots:
            _check_tensor(weights, source, slots[target])
            names[source] = target
    unplaced = sorted(source for source in weights.names if source not in names and not source.endswith("inv_freq"))
    _leave_out_tied(model, weights, names)
    _check_missing(model, weights, names, slots)
    return names, tuple(unplaced)


def _refuse_unknown_matrices(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        if parameter.dim() >= 2 and type(owner) is not nn.Linear and not isinstance(owner, nn.Embedding):
            raise UserError(
                f"base.model: {model.config.model_type} keeps {name} {list(parameter.shape)} outside a "
                "linear layer, where it would stay unquantised (fused experts, convolutions); choose a dense "
                "decoder, or set base.quantization: none"
            )


def _check_tensor(weights: Weights, source: str, slot: torch.Tensor) -> None:
    if weights.dtype(source) not in READABLE:
        raise UserError(
            f"base.model: tensor {source} in {weights.folder} has dtype {weights.dtype(source)}; expected "
            "bf16, fp16 or fp32: take the model before its quantisation"
        )
    if weights.shape(source) != tuple(slot.shape):
        raise UserError(
            f"base.model: tensor {source} in {weights.folder} has shape {list(weights.shape(source))}, but "
            f"config.json makes it {list(slot.shape)}; config and weights belong to different models"
        )


def _leave_out_tied(model: PreTrainedModel, weights: Weights, names: dict[str, str]) -> None:
    """Where the files hold both of two tied tensors, keep one, having seen that they are equal."""
    sources = {target: source for source, target in names.items()}
    for target, origin in model.all_tied_weights_keys.items():
        if target in sources and origin in sources:
            if not weights.equal(sources[target], sources[origin]):
                raise UserError(
                    f"base.model: {weights.folder}/config.json ties {target} to {origin}, but the files hold "
                    "two different tensors; set tie_word_embeddings to false there"
                )
            del names[sources[target]]


def _check_missing(model: PreTrainedModel, weights: Weights, names: dict[str, str], slots: dict) -> None:
    present = set(names.values())
    for target, origin in model.all_tied_weights_keys.items():
        if target in present or origin in present:
            present |= {target, origin}
    missing = sorted(set(slots) - present)
    if missing:
        raise UserError(
            f"base.model: {weights.folder} lacks {len(missing)} tensors of {model.config.model_type}, first "
            f"{missing[0]}; fetch the model again, with all its files"
        )
