"""Which cells are run, in which order."""

from collections.abc import Iterator, Sequence

from benchmarks.quality.settings import TRAINED, TRIALS, Cell

SEEDS = (1, 2, 3)
TUNING_SEED = 0  # the seed of no cell that is compared
LEARNING_RATES = (5e-4, 1e-3, 2e-3, 4e-3)  # every method's tuning budget


def tuning_cells() -> list[Cell]:
    return [Cell(method, TUNING_SEED, rate, tuning=True) for rate in LEARNING_RATES for method in TRAINED]


def trial_cells(rates: dict[str, float]) -> list[Cell]:
    """rates: as below."""
    return [
        Cell(method, TUNING_SEED, rates[method], tuning=True, trial=name)
        for name, trial in TRIALS.items()
        for method in trial.methods
    ]


def compared_cells(rates: dict[str, float], seeds: Sequence[int] = SEEDS) -> Iterator[Cell]:
    """A seed of every part after the other, the table of methods first. rates: the learning rate found by method."""
    yield Cell("base", 0, 0.0)
    for seed in seeds:
        yield from (Cell(method, seed, rates[method]) for method in TRAINED)
    for seed in seeds:
        yield from (Cell(m, seed, rates[m], experts=k) for k in (1, 2, 8) for m in ("teamlora", "moelora"))
        yield from (Cell(m, seed, rates[m], share=share) for share in (25, 50) for m in ("teamlora", "moelora", "lora"))
