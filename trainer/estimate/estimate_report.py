"""What `teamlora estimate` prints: tables and a verdict, or one JSON object."""

import json

from data_prep.tables import text_table
from data_prep.user_error import UserError
from trainer.estimate.estimate import Estimate, Estimator
from trainer.estimate.resident import LIBRARIES, DeviceKind, MemoryUse
from trainer.estimate.suggest import Suggestion, suggest
from trainer.recipe import Recipe

GIB = 2**30


def report(recipe: Recipe, world_size: int, nodes: int, device: int | None, host: int | None, as_json: bool) -> None:
    """Prints the estimate. nodes: with as many ranks each. device, host: memory per rank in bytes; None is no limit.

    The estimate is for a GPU if `device` is given or this machine has a GPU, else for a CPU. Raises UserError for what
    a run would refuse and, after printing, if the run does not fit.
    """
    if world_size % nodes:
        raise UserError(f"--nodes {nodes} does not divide --world-size {world_size}; every node has as many ranks")
    estimator = Estimator(recipe, "cuda" if device is not None else None, world_size // nodes)
    estimate = estimator.estimate(recipe, world_size)
    fits = estimate.fits(device, host)
    suggestions = [] if fits else suggest(estimator, estimate, device, host)
    if as_json:
        by_kind = {kind: estimator.estimate(recipe, world_size, kind) for kind in LIBRARIES}
        print(json.dumps(_as_object(estimate, estimator.kind, by_kind, device, host, suggestions)))
    else:
        print("\n".join([*_tables(estimate, estimator.kind), *_verdict(estimate, device, host, suggestions)]))
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
