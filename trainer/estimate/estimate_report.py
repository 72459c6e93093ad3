"""What `teamlora estimate` prints: a table for a person, or one JSON object."""

import json

from data_prep.user_error import UserError
from trainer.estimate.estimate import Estimate, Estimator
from trainer.estimate.measured import LIBRARIES, DeviceKind
from trainer.estimate.sizes import GIB
from trainer.estimate.suggest import Change, suggestions
from trainer.recipe import Recipe


def report(recipe: Recipe, world_size: int, device: int | None, host: int | None, as_json: bool) -> None:
    """Prints the estimate; device, host: memory of one rank in bytes, None is no limit.

    Of a GPU where its memory is given or this machine has one, else of a CPU. Raises UserError for what a run would
    refuse, and, once all is printed, where it does not fit.
    """
    estimator = Estimator(recipe, "cuda" if device is not None else None)
    found = estimator.estimate(recipe, world_size)
    others = [] if found.fits(device, host) else suggestions(estimator, found, device, host)
    if as_json:
        on = {kind: estimator.estimate(recipe, world_size, kind) for kind in LIBRARIES}
        print(json.dumps(_as_object(found, estimator.kind, on, device, host, others)))
    else:
        print("\n".join([*_table(found, estimator.kind), *_verdict(found, device, host, others)]))
    if not found.fits(device, host):
        raise UserError(_shortage(found, device, host, others))


def _table(found: Estimate, kind: DeviceKind) -> list[str]:
    zero = f"ZeRO-{found.zero.stage}, {kind}"
    lines = [f"{f'GiB of each of {found.world_size} ranks, {zero}':36}{'device':>10}{'host':>10}"]
    lines += [_line(row.name, row.device, row.host) for row in found.rows]
    lines += [_line("peak", found.device, found.host), _line("while loading", found.loading.device, found.loading.host)]
    lines += ["", f"{'GiB a rank sends in a step':36}{'':10}"]
    lines += [f"{name:36}{size / GIB:10.3f}" for name, size in found.sent.items()]
    return lines


def _line(name: str, device: int, host: int) -> str:
    return f"{name:36}{device / GIB:10.3f}{host / GIB:10.3f}"


def _verdict(found: Estimate, device: int | None, host: int | None, others: list[tuple[Change, Estimate]]) -> list[str]:
    if device is None and host is None:
        return []
    told = ", ".join(_told(*given) for given in _limits(found, device, host))
    if found.fits(device, host):
        return ["", f"fits            {told}"]
    lines = ["", f"does not fit    {told}"]
    if not others:
        return [*lines, "nothing that was tried would fit: take a smaller base, shorter rows or more ranks"]
    return lines + [
        f"would fit       {_settings(c)}  ({e.device / GIB:.2f} + {e.host / GIB:.2f} GiB)" for c, e in others
    ]


def _shortage(found: Estimate, device: int | None, host: int | None, others: list[tuple[Change, Estimate]]) -> str:
    """One line: what does not fit, and the nearest change that would."""
    short = ", ".join(_told(*given) for given in _limits(found, device, host) if given[0] > given[1])
    if not others:
        return f"does not fit: {short}; take a smaller base, shorter rows or more ranks"
    return f"does not fit: {short}; it would with {_settings(others[0][0])}"


def _limits(found: Estimate, device: int | None, host: int | None) -> list[tuple[int, int, str]]:
    """(bytes needed, bytes given, of what) for each limit that was given."""
    limits = [(found.device, device, "device"), (found.host, host, "host")]
    return [(size, limit, name) for size, limit, name in limits if limit is not None]


def _told(size: int, limit: int, name: str) -> str:
    return f"{name} {size / GIB:.2f} of {limit / GIB:.2f} GiB"


def _settings(change: Change) -> str:
    return " ".join(change.settings)


def _as_object(
    found: Estimate,
    kind: DeviceKind,
    on: dict[DeviceKind, Estimate],
    device: int | None,
    host: int | None,
    others: list[tuple[Change, Estimate]],
) -> dict[str, object]:
    """Bytes throughout, but for `trained_parameters`. on: the same on each kind of device, for `peak_on`."""
    return {
        "world_size": found.world_size,
        "trained_parameters": found.trained,
        "device_kind": kind,
        "zero_stage": found.zero.stage,
        "resident": {row.name: {"device": row.device, "host": row.host} for row in found.resident},
        "transient": found.transient.by_name,
        "peak": {"device": found.device, "host": found.host},
        "peak_on": {name: {"device": each.device, "host": each.host} for name, each in on.items()},
        "loading": {"device": found.loading.device, "host": found.loading.host},
        "sent_a_step": found.sent,
        "limits": {"device": device, "host": host},
        "fits": found.fits(device, host),
        "would_fit": [
            {"settings": list(change.settings), "device": other.device, "host": other.host} for change, other in others
        ],
    }
