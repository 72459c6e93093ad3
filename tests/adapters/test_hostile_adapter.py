"""Adapter folders that would fetch or read more than they hold are refused before PEFT does so."""

import json
from pathlib import Path

import pytest

from data_prep.user_error import UserError
from trainer.adapters.adapter_folder import read_adapter_config


@pytest.mark.parametrize("kind", ["XLORA", "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "LOHA"])
def test_methods_of_others_are_refused(tmp_path, kind):
    """X-LoRA's configuration names further adapters, multitask prompt tuning's a pickle."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind, "task_type": "CAUSAL_LM"}))
    with pytest.raises(UserError) as caught:
        read_adapter_config(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} holds no adapter that PEFT can read (a {kind} is none of LORA, TEAMLORA, MOELORA, HYDRALORA); "
        "give the adapter/ folder of a run"
    )


def test_a_folder_without_a_configuration_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone" / "adapter").mkdir(parents=True)
    monkeypatch.setattr("peft.config.hf_hub_download", lambda *_, **__: pytest.fail("asked the Hub"))
    with pytest.raises(UserError, match=r"someone/adapter holds no adapter .*\(it has no adapter_config\.json\)"):
        read_adapter_config(Path("someone/adapter"))
