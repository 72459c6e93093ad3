"""What `teamlora estimate` prints: tables and a verdict, or one JSON object."""

import json
from dataclasses import dataclass

from data_prep.tables import text_table
from data_prep.user_error import UserError
from trainer.estimate.estimate import Estimate, Estimator
from trainer.estimate.resident import LIBRARIES, DeviceKind, MemoryUse
from trainer.estimate.step_time import GIB, TERA, Hardware
from trainer.estimate.suggest import Suggestion, suggest, suggest_faster
from trainer.recipe import Recipe


@dataclass(frozen=True)
class Machines:
    """Where a run would be. nodes: with as many ranks each. device, host: memory per rank in bytes; None is no limit.
    hardware: None where times are not asked for."""

    world_size: int
    nodes: int
    device: int | None = None
    host: int | None = None
    hardware: Hardware | None = None


def place_ranks(world_size: int | None, nodes: int | None, per_node: int | None) -> tuple[int, int]:
    """(ranks, nodes) from what was given of --world-size, --nodes and --gpus-per-node. Raises UserError."""
    if per_node is not None and world_size is not None and nodes is None:
        nodes = max(1, world_size // per_node)
    nodes = nodes or 1
    if world_size is None:
        world_size = nodes * (per_node or 1)
    if world_size % nodes:
        raise UserError(f"--nodes {nodes} does not divide --world-size {world_size}; every node has as many ranks")
    if per_node is not None and world_size != nodes * per_node:
        raise UserError(
            f"--gpus-per-node {per_node}: {nodes} nodes of as many are not --world-size {world_size}; leave one out"
        )
    return world_size, nodes


def report(recipe: Recipe, machines: Machines, as_json: bool) -> None:
    """Prints the estimate.

    It is for a GPU if `device` or `hardware` is given or this machine has a GPU, else for a CPU. Raises UserError for
    what a run would refuse and, after printing, if the run does not fit.
    """
    device, host, hardware = machines.device, machines.host, machines.hardware
    kind: DeviceKind | None = "cuda" if device is not None or hardware is not None else None
    estimator = Estimator(recipe, kind, machines.world_size // machines.nodes)
    estimate = estimator.estimate(recipe, machines.world_size)
    fits = estimate.fits(device, host)
    suggestions = [] if fits else suggest(estimator, estimate, device, host)
    faster = suggest_faster(estimator, estimate, hardware, device, host) if hardware is not None else []
    if as_json:
        by_kind = {kind: estimator.estimate(recipe, machines.world_size, kind) for kind in LIBRARIES}
        found = _as_object(estimate, estimator.kind, by_kind, device, host, suggestions)
        if hardware is not None:
            found["time_of_a_step"] = _time_as_object(estimate, hardware, faster)
        print(json.dumps(found))
    else:
        lines = [*_tables(estimate, estimator.kind), *_verdict(estimate, device, host, suggestions)]
        if hardware is not None:
            lines += ["", *_times(estimate, hardware, faster)]
        print("\n".join(lines))
    if not fits:
        raise UserError(_shortage(estimate, device, host, suggestions))


def _tables(estimate: Estimate, kind: DeviceKind) -> list[str]:
    ranks = "1 rank" if estimate.world_size == 1 else f"{estimate.world_size} ranks"
    title = f"GiB per rank ({ranks}, ZeRO-{estimate.zero.stage}, {kind})"
    peak = MemoryUse("peak", estimate.device, estimate.host)
    uses = [
        (use.name, f"{use.device / GIB:.3f}", f"{use.host / GIB:.3f}")
        for use in (*estimate.rows, peak, estimate.loading)
    ]
    tables = [text_table((title, "device", "host"), uses), "", _traffic("sent per rank and step", estimate.sent)]
    if any(estimate.between_nodes.values()):
        tables += ["", _traffic("out of each node and step", estimate.between_nodes)]
    return tables


def _times(estimate: Estimate, hardware: Hardware, faster: list[Suggestion]) -> list[str]:
    """A table of a step's time, and what would be faster."""
    time = estimate.step_time(hardware)
    rows = [
        ("arithmetic", time.arithmetic),
        ("links inside a node", time.inside),
        ("link between nodes", time.between),
        ("links, while nothing is computed", time.exposed),
        ("step", time.step),
    ]
    table = text_table(("per step", "seconds"), [(name, f"{seconds:.3f}") for name, seconds in rows])
    lines = [
        table,
        "",
        f"speed           {estimate.tokens / time.step:,.0f} tokens/s, bound by {time.bound_by} (arithmetic at "
        f"{hardware.flops / TERA:,.0f} TFLOPS per GPU)",
    ]
    for each in faster:
        seconds = each.estimate.step_time(hardware).step
        lines.append(f"faster          {each.settings}  ({seconds:.3f} s, {time.step / seconds:.2f}x)")
    return lines


def _time_as_object(estimate: Estimate, hardware: Hardware, faster: list[Suggestion]) -> dict[str, object]:
    """Seconds; `faster` with those of each suggestion."""
    time = estimate.step_time(hardware)
    return {
        **{name: getattr(time, name) for name in ("arithmetic", "inside", "between", "exposed", "step", "bound_by")},
        "tokens_per_second": estimate.tokens / time.step,
        "faster": [
            {"settings": list(each.change.settings), "step": each.estimate.step_time(hardware).step} for each in faster
        ],
    }


def _traffic(title: str, sizes: dict[str, int]) -> str:
    return text_table((title, "GiB"), [(name, f"{size / GIB:.3f}") for name, size in sizes.items()])


def _verdict(estimate: Estimate, device: int | None, host: int | None, suggestions: list[Suggestion]) -> list[str]:
    if device is None and host is None:
        return []
    needs = ", ".join(_need(*limit) for limit in _limits(estimate, device, host))
    if estimate.fits(device, host):
        return ["", f"fits            {needs}"]
    lines = ["", f"does not fit    {needs}"]
    if not suggestions:
        return [*lines, "none of the changes tried would fit: take a smaller base, shorter rows or more ranks"]
    for suggestion in suggestions:
        device_gib, host_gib = suggestion.estimate.device / GIB, suggestion.estimate.host / GIB
        lines.append(f"would fit       {suggestion.settings}  (device {device_gib:.2f}, host {host_gib:.2f} GiB)")
    return lines


def _shortage(estimate: Estimate, device: int | None, host: int | None, suggestions: list[Suggestion]) -> str:
    """One line: what does not fit, and the nearest change that would."""
    short = ", ".join(_need(*limit) for limit in _limits(estimate, device, host) if limit[0] > limit[1])
    if not suggestions:
        return f"does not fit: {short}; take a smaller base, shorter rows or more ranks"
    return f"does not fit: {short}; it would fit with {suggestions[0].settings}"


def _limits(estimate: Estimate, device: int | None, host: int | None) -> list[tuple[int, int, str]]:
    """(bytes needed, bytes available, where) for each limit that was given."""
    limits = [(estimate.device, device, "device"), (estimate.host, host, "host")]
    return [(size, limit, name) for size, limit, name in limits if limit is not None]


def _need(size: int, limit: int, name: str) -> str:
    return f"{name} {size / GIB:.2f} of {limit / GIB:.2f} GiB"


def _as_object(
    estimate: Estimate,
    kind: DeviceKind,
    by_kind: dict[DeviceKind, Estimate],
    device: int | None,
    host: int | None,
    suggestions: list[Suggestion],
) -> dict[str, object]:
    """All sizes are bytes; `trained_parameters` counts elements. by_kind: estimates for `peak_on`."""
    return {
        "world_size": estimate.world_size,
        "trained_parameters": estimate.trained,
        "device_kind": kind,
        "zero_stage": estimate.zero.stage,
        "resident": {use.name: {"device": use.device, "host": use.host} for use in estimate.resident},
        "transient": estimate.transient.by_name,
        "peak": {"device": estimate.device, "host": estimate.host},
        "peak_on": {name: {"device": each.device, "host": each.host} for name, each in by_kind.items()},
        "loading": {"device": estimate.loading.device, "host": estimate.loading.host},
        "sent_a_step": estimate.sent,
        "between_nodes_a_step": estimate.between_nodes,
        "limits": {"device": device, "host": host},
        "fits": estimate.fits(device, host),
        "would_fit": [
            {
                "settings": list(suggestion.change.settings),
                "device": suggestion.estimate.device,
                "host": suggestion.estimate.host,
            }
            for suggestion in suggestions
        ],
    }
