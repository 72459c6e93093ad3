"""`teamlora check` on emulated hosts: a good set-up passes, and each mistake is found on the host that has it."""

import json

import pytest

from tests.support.cluster.bad_setups import BAD_SETUPS, check_on_hosts
from tests.support.workplace import Workplace, make_workplace
from trainer.run.launch_protocol import MISTAKE

pytestmark = pytest.mark.slow

GOOD = "node-a slots=1\nnode-b slots=1\n"
PATIENT = ("--limit", "100")  # a busy machine takes its time to import torch, for the estimate


@pytest.fixture(scope="module")
def place(can_emulate, tmp_path_factory) -> Workplace:
    """A prepared workplace in a subfolder, so that its parent can be hidden."""
    place = make_workplace(tmp_path_factory.mktemp("check") / "place")
    done = place.teamlora("prepare", "recipe.yaml")
    assert done.returncode == 0, done.stderr
    return place


def findings(done) -> list[dict[str, str]]:
    return json.loads(done.stdout)["findings"]


def test_a_good_set_up_passes_and_every_check_says_so(cluster, place):
    done, _ = check_on_hosts(cluster, place, GOOD, "run.nodes=2", *PATIENT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {finding["level"] for finding in findings(done)} == {"ok"}
    expected = "reached machine slots packages code recipe base prepared clock port connection memory"
    assert set(expected.split()) <= {finding["what"] for finding in findings(done)}
    assert cluster.wait_until_idle() == []


@pytest.mark.parametrize("name", BAD_SETUPS)
def test_a_bad_set_up_is_found_on_the_host_that_has_it(cluster, place, tmp_path, name):
    bad = BAD_SETUPS[name]
    with bad.make(cluster, place, tmp_path):
        done, _ = check_on_hosts(cluster, place, bad.hostfile, *bad.options, *PATIENT)
    assert done.returncode == (MISTAKE if bad.level == "error" else 0), done.stdout + done.stderr
    (finding,) = (finding for finding in findings(done) if finding["level"] != "ok")
    assert (finding["level"], finding["host"], finding["what"]) == (bad.level, bad.host, bad.what)
    assert bad.text in finding["text"]
    assert finding["remedy"]
    assert cluster.wait_until_idle() == []


def test_a_line_that_deepspeeds_launcher_cannot_read_is_an_error(cluster, place):
    variables = place.folder / ".deepspeed_env"
    variables.write_text("OMP_NUM_THREADS=1\n\n# a comment\n")
    try:
        done, _ = check_on_hosts(cluster, place, GOOD)
    finally:
        variables.unlink()
    (error,) = [finding["text"] for finding in findings(done) if finding["level"] == "error"]
    assert done.returncode == MISTAKE
    assert error.startswith(f"{variables}, line 2: ''")
