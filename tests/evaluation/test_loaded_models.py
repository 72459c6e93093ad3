"""Which runs may be compared under one base."""

import pytest

from data_prep.user_error import UserError
from tests.support import scene
from trainer.evaluation.loaded_models import check_same_base
from trainer.run import run_dir


@pytest.mark.parametrize("folder", ["test", "test/adapter"])
def test_a_run_on_other_values_of_the_base_is_refused(tmp_path, folder):
    run = scene.recipe("base", run__output_dir=str(tmp_path), run__name="test", base__quantization="none")
    run_dir.create(run, {})
    check_same_base(tmp_path / folder, run)
    check_same_base(tmp_path / "an adapter alone", scene.recipe("base", base__quantization="nf4"))
    told = r"test.*: trained with base\.quantization=none, but the evaluated model with nf4; one base cannot"
    with pytest.raises(UserError, match=told):
        check_same_base(tmp_path / folder, scene.recipe("base", base__quantization="nf4"))
