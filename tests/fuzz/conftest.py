import pytest

from tests.fuzz.fuzzing import PROPERTY, outcomes

__all__ = ["outcomes"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line per fuzz test with more than one example, and the sum of all, before pytest's own last line."""
    lines = []
    failed_ids = {report.nodeid for report in terminalreporter.stats.get("failed", [])}
    for report in terminalreporter.stats.get("", []):  # those of set-ups and tear-downs, which know the counts
        counts = dict(report.user_properties).get(PROPERTY)
        if report.when == "teardown" and counts is not None:
            outcome = "failed" if report.nodeid in failed_ids else "passed"
            found = (counts["examples"], counts["accepted"], counts["refused"])
            lines.append((report.nodeid.partition("::")[2], *found, outcome))
    if not lines:
        return
    terminalreporter.section("fuzzed input")
    for name, examples, accepted, refused, outcome in lines:
        if examples == 1 and outcome == "passed":
            continue  # a single case of a parametrized test
        terminalreporter.line(
            f"{name:60} {examples:6} examples {accepted:6} accepted {refused:6} refused in one line, {outcome}"
        )
    examples, accepted, refused = (sum(line[at] for line in lines) for at in (1, 2, 3))
    failed = sum(line[-1] == "failed" for line in lines)
    terminalreporter.line(
        f"fuzz: {examples} examples: {accepted} times accepted and right, {refused} times refused in one line; "
        f"{failed} of {len(lines)} tests found an input with a traceback, a hang or a loss"
    )
