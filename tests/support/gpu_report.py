"""What the tests for GPUs leave: which card, driver and versions, what passed, and figures."""

import json
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass
class GpuReport:
    """machine: card, driver and versions by name. results: outcome by test. figures: numbers or texts by name."""

    machine: dict[str, str]
    results: dict[str, str] = field(default_factory=dict)
    figures: dict[str, float | str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Leaves report.json and report.md."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(json.dumps(asdict(self), indent=1) + "\n")
        (folder / "report.md").write_text(self.markdown())

    def markdown(self) -> str:
        passed = sum(outcome == "passed" for outcome in self.results.values())
        parts = [f"# Tests on a GPU: {passed} of {len(self.results)} passed"]
        for title, heads, rows in (
            ("Machine", ("what", "found"), self.machine),
            ("Tests", ("test", "outcome"), self.results),
            ("Figures", ("figure", "value"), self.figures),
        ):
            lines = [f"| {name} | {value} |" for name, value in rows.items()]
            parts.append("\n".join([f"## {title}", "", f"| {heads[0]} | {heads[1]} |", "|---|---|", *lines]))
        return "\n\n".join(parts) + "\n"


def describe_machine() -> dict[str, str]:
    """Of the current GPU."""
    import torch

    from trainer.run.provenance import commit, versions

    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    return {
        "card": found.name,
        "memory": f"{found.total_memory / 2**30:.1f} GiB",
        "driver": driver[0] if driver else "unknown",
        "CUDA of torch": str(torch.version.cuda),
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
        "commit": commit() or "unknown",
        **{name: str(version) for name, version in versions().items()},
    }
