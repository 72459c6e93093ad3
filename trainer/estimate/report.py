"""What `teamlora estimate` prints: a table for a person, or one JSON object."""

import json

from trainer.estimate.estimate import Estimate, Estimator
from trainer.estimate.sizes import GIB
from trainer.estimate.suggest import Change, suggestions
from trainer.recipe import Recipe


def report(recipe: Recipe, world_size: int, device: int | None, host: int | None, as_json: bool) -> str:
    """device, host: memory of one rank in bytes; None is no limit. Raises UserError for what a run would refuse."""
    estimator = Estimator(recipe)
    found = estimator.estimate(recipe, world_size)
    fits = found.fits(device, host)
    others = [] if fits else suggestions(estimator, found, device, host)
    if as_json:
        return json.dumps(_as_object(found, device, host, others))
    return "\n".join([*_table(found), *_verdict(found, device, host, others)])


def _table(found: Estimate) -> list[str]:
    zero = f"ZeRO stage {found.zero.stage}"
    lines = [f"{f'GiB of each of {found.world_size} ranks, {zero}':36}{'device':>10}{'host':>10}"]
    lines += [_line(row.name, row.device, row.host) for row in found.rows]
    lines += [_line("peak", found.device, found.host), "", f"{'GiB a rank sends in a step':36}{'':10}"]
    lines += [f"{name:36}{size / GIB:10.3f}" for name, size in found.sent.items()]
    return lines


def _line(name: str, device: int, host: int) -> str:
    return f"{name:36}{device / GIB:10.3f}{host / GIB:10.3f}"


def _verdict(found: Estimate, device: int | None, host: int | None, others: list[tuple[Change, Estimate]]) -> list[str]:
    if device is None and host is None:
        return []
    limits = [(found.device, device, "device"), (found.host, host, "host")]
    given = [(size, limit, name) for size, limit, name in limits if limit is not None]
    told = ", ".join(f"{name} {size / GIB:.2f} of {limit / GIB:.2f} GiB" for size, limit, name in given)
    if found.fits(device, host):
        return ["", f"fits            {told}"]
    lines = ["", f"does not fit    {told}"]
    if not others:
        return [*lines, "nothing that was tried would fit: take a smaller base, shorter rows or more ranks"]
    return lines + [
        f"would fit       {_settings(c)}  ({e.device / GIB:.2f} + {e.host / GIB:.2f} GiB)" for c, e in others
    ]


def _settings(change: Change) -> str:
    return " ".join(change.settings)


def _as_object(
    found: Estimate, device: int | None, host: int | None, others: list[tuple[Change, Estimate]]
) -> dict[str, object]:
    """Bytes throughout, but for `trained_parameters`."""
    return {
        "world_size": found.world_size,
        "trained_parameters": found.trained,
        "zero_stage": found.zero.stage,
        "resident": {row.name: {"device": row.device, "host": row.host} for row in found.resident},
        "transient": found.transient.by_name,
        "peak": {"device": found.device, "host": found.host},
        "sent_a_step": found.sent,
        "limits": {"device": device, "host": host},
        "fits": found.fits(device, host),
        "would_fit": [
            {"settings": list(change.settings), "device": other.device, "host": other.host} for change, other in others
        ],
    }
