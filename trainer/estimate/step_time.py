"""Seconds of an optimizer step on machines that are not here: of arithmetic, and of the links inside and between nodes.

Arithmetic is counted in full: rows of data.seq_len tokens, all of them labeled, each row one document. A frozen linear
of n elements costs 2 n operations per token in forward and as many in backward, which passes gradients on and computes
none for the weight; what learns costs 6 n. Attention looks back, at half of the row on average. Checkpointing computes
the decoder's forward twice.

A step is as long as the slowest of arithmetic and links, as far as they overlap: ZeRO-3 gathers ahead, and reduces
gradients during backward if there is one micro-batch and one copy of the adapter. Otherwise it reduces them once,
when backward has ended, and nothing is left to hide that behind.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from data_prep.user_error import UserError
from trainer.base.nf4 import NF4Linear
from trainer.estimate.rank_model import RankModel
from trainer.estimate.traffic import Flow
from trainer.objective.batches import BatchPlan
from trainer.recipe import Recipe

TERA = 1e12
GIB = 2**30
UTILIZATION = 0.4
"""Part of a GPU's peak that arithmetic is taken to reach. An assumption: `--tflops` takes what was measured instead."""


@dataclass(frozen=True)
class Gpu:
    """From its data sheet. tflops: peak in bf16, dense. link: bytes per second to the GPUs of its node, one way.
    memory: bytes that torch sees, rounded down to GiB."""

    tflops: float
    link: float
    memory: int


NVLINK_5, NVLINK_4, NVLINK_3 = 900e9, 450e9, 300e9
PCIE_5, PCIE_4 = 63e9, 31.5e9  # 16 lanes
GPUS = {
    "b200": Gpu(2250, NVLINK_5, 179 * GIB),
    "h200": Gpu(989, NVLINK_4, 140 * GIB),
    "h100": Gpu(989, NVLINK_4, 79 * GIB),
    "a100": Gpu(312, NVLINK_3, 79 * GIB),
    "l40s": Gpu(362, PCIE_4, 44 * GIB),
    "l4": Gpu(121, PCIE_4, 22 * GIB),
    "a10": Gpu(125, PCIE_4, 22 * GIB),
    "5090": Gpu(209, PCIE_5, 31 * GIB),
    "4090": Gpu(165, PCIE_4, 23 * GIB),
    "3090": Gpu(71, PCIE_4, 23 * GIB),
}


@dataclass(frozen=True)
class Hardware:
    """flops: operations per second that a rank reaches. inside: bytes per second from a rank to those of its node.
    between: from a node to the others. memory: bytes of a GPU. None: no limit is known."""

    flops: float
    inside: float | None = None
    between: float | None = None
    memory: int | None = None


def hardware(gpu: str | None, tflops: float | None, link: float | None) -> Hardware | None:
    """From --gpu, --tflops and --link (bytes per second); None where no times are asked for. Raises UserError."""
    known = GPUS.get(gpu.lower()) if gpu is not None else None
    if gpu is not None and known is None:
        raise UserError(f"--gpu {gpu}: not known here; use one of {', '.join(GPUS)}, or --tflops")
    if known is not None:
        return Hardware(TERA * (tflops or UTILIZATION * known.tflops), known.link, link, known.memory)
    if tflops is not None:
        return Hardware(TERA * tflops, between=link)
    if link is not None:
        raise UserError("--link: times need the speed of arithmetic, too; add --gpu or --tflops")
    return None


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step. inside, between: that the links inside and between nodes are at work. hidden: of these, what
    overlaps with arithmetic; exposed: what does not."""

    arithmetic: float
    inside: float
    between: float
    hidden: float
    exposed: float

    @property
    def step(self) -> float:
        return max(self.arithmetic, self.hidden) + self.exposed

    @property
    def bound_by(self) -> str:
        """What takes most of the step."""
        if self.arithmetic >= max(self.hidden, self.exposed):
            return "arithmetic"
        return "the link between nodes" if self.between >= self.inside else "the links inside a node"


def step_time(flops: float, flows: Iterable[Flow], ranks_per_node: int, hardware: Hardware) -> StepTime:
    """flops: of one rank in a step. Links inside and between nodes work at the same time."""
    links = {True: (0.0, 0.0), False: (0.0, 0.0)}  # by whether they overlap with arithmetic
    for flow in flows:
        inside, between = links[flow.overlaps]
        links[flow.overlaps] = (
            inside + _seconds(float(flow.inside_node(ranks_per_node)), hardware.inside),
            between + _seconds(float(flow.out_of_node(ranks_per_node)), hardware.between),
        )
    return StepTime(
        arithmetic=flops / hardware.flops,
        inside=links[True][0] + links[False][0],
        between=links[True][1] + links[False][1],
        hidden=max(links[True]),
        exposed=max(links[False]),
    )


def step_flops(rank_model: RankModel, recipe: Recipe, plan: BatchPlan) -> float:
    """Operations of one rank in an optimizer step; a multiplication and an addition are two."""
    tokens = recipe.train.micro_batch_size * recipe.data.seq_len * plan.gradient_accumulation_steps
    linears = [
        m for layer in rank_model.decoder_layers for m in layer.modules() if isinstance(m, NF4Linear | nn.Linear)
    ]
    frozen = sum(m.in_features * m.out_features for m in linears if not any(p.requires_grad for p in m.parameters()))
    trained = rank_model.trained_elements
    text = rank_model.config.get_text_config()
    width = text.num_attention_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    attention = text.num_hidden_layers * width * recipe.data.seq_len  # two products per token, over half of the row
    forward = 2 * (frozen + trained + attention)
    backward = 2 * frozen + 4 * (trained + attention)
    again = forward if recipe.train.activation_checkpointing else 0
    head = 4 * rank_model.head.weight.numel()
    return float(tokens) * (forward + backward + again + head)


def _seconds(size: float, rate: float | None) -> float:
    return size / rate if rate else 0.0
