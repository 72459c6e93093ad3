"""GPUs that torch cannot use, ranks without one, and memory that runs out: told in one line. torch.cuda is played."""

import itertools
from pathlib import Path

import pytest
import torch

from data_prep.user_error import UserError
from trainer.cli import main
from trainer.cluster.local_ranks import slots_here
from trainer.errors import OwnFault
from trainer.run import gpu

# As torch 2.13 raises them.
OLD_DRIVER = (
    "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver by downloading "
    "and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx Alternatively, go to: ..."
)
FULL = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.7 GiB of which 1.10 GiB is free. "
    "Process 4242 has 22.58 GiB memory in use. Of the allocated memory 20.11 GiB is allocated by PyTorch, and ..."
)


@pytest.fixture
def play(monkeypatch):
    """Plays a machine: GPUs that torch can use, that NVML counts, and that have files of the driver."""

    def play(usable: int = 0, counted: int = 0, files: int = 0, visible: str | None = None) -> None:
        def init() -> None:
            raise RuntimeError(OLD_DRIVER)

        monkeypatch.setattr(torch.cuda, "is_available", lambda: usable > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: usable or counted)
        monkeypatch.setattr(torch.cuda, "init", init)
        monkeypatch.setattr(gpu, "gpu_files", lambda: [Path(f"/dev/nvidia{number}") for number in range(files)])
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return play


@pytest.mark.parametrize(("counted", "files"), [(2, 2), (2, 0), (0, 2)], ids=["both", "NVML only", "a CPU build"])
def test_a_gpu_that_torch_cannot_use_is_refused_with_torchs_reason(play, counted, files):
    play(counted=counted, files=files)
    with pytest.raises(UserError) as refusal:
        gpu.compute_device()
    assert str(refusal.value) == (
        f"torch {torch.__version__} cannot use this machine's GPU (The NVIDIA driver on your system is too old (found "
        "version 12020)); update the driver or install another build of torch, see docs/gpu.md; to run on the CPU, "
        "set CUDA_VISIBLE_DEVICES to nothing"
    )


@pytest.mark.parametrize("visible", ["", "-1", "NoDevFiles"])
def test_whoever_hides_the_gpus_gets_the_cpu(play, visible):
    play(counted=0, files=2, visible=visible)
    assert gpu.compute_device() == torch.device("cpu")


def test_a_machine_without_gpus_and_one_with_usable_ones_are_as_ever(play):
    play()
    assert gpu.compute_device() == torch.device("cpu")
    play(usable=2, files=2)
    assert gpu.compute_device() == torch.device("cuda")


def test_a_launch_refuses_before_it_starts_ranks(play):
    play(counted=2, files=2)
    with pytest.raises(UserError, match="cannot use this machine's GPU"):
        slots_here(None)


def test_generating_refuses_before_it_reads_anything(play, tmp_path, capsys):
    play(counted=1, files=1)
    assert main(["generate", str(tmp_path / "none"), "--prompt", "Hello"]) == 2
    assert "cannot use this machine's GPU" in capsys.readouterr().err


def test_a_rank_without_a_gpu_of_its_own_is_told_how_many_there_are(play, monkeypatch):
    play(usable=2, files=2, visible="0,1")
    taken = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert gpu.take_gpu(1) == torch.device("cuda", 1)
    assert taken == [1]
    with pytest.raises(UserError) as refusal:
        gpu.take_gpu(2)
    assert str(refusal.value) == (
        "LOCAL_RANK=2: this rank sees 2 GPUs (CUDA_VISIBLE_DEVICES: 0,1); start at most one rank per GPU (num_gpus=2, "
        "slots=2 in a hostfile, or your launcher's number of processes per node)"
    )


@pytest.mark.parametrize("error", [gpu.RankWithoutGpu("too many ranks"), OwnFault("no room in /dev/shm")])
def test_an_error_that_only_this_rank_has_met_is_printed_by_it(error, monkeypatch, capsys):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("trainer.cli._recipe", fail)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main(["train", "my.yaml"]) == (2 if isinstance(error, UserError) else 1)
    assert capsys.readouterr().err == f"error: {error}\n"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(FULL), RuntimeError("CUDA error: out of memory")])
def test_exhausted_memory_is_one_line_with_what_to_change(error, monkeypatch, capsys):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("trainer.cli._recipe", fail)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main(["train", "my.yaml"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    told = FULL.partition(" Process")[0] if error.args[0] == FULL else error.args[0]
    assert line == (
        f"error: rank 1: the GPU's memory is exhausted ({told}); lower train.micro_batch_size (--batch-size in "
        "evaluation) or data.seq_len, set train.activation_checkpointing=true or offload, and ask `teamlora estimate` "
        "what fits"
    )


def test_other_errors_of_cuda_are_left_alone():
    assert gpu.out_of_memory(RuntimeError("CUDA error: device-side assert triggered")) is None


@pytest.mark.parametrize("name", gpu.ALLOCATOR_SETTINGS)
def test_the_allocators_defaults_give_way_to_the_users(monkeypatch, name):
    for each in gpu.ALLOCATOR_SETTINGS:
        monkeypatch.setenv(each, "")
        monkeypatch.delenv(each)
    gpu.configure_allocator()
    given = dict(pair.split(":") for pair in gpu.os.environ["PYTORCH_CUDA_ALLOC_CONF"].split(","))
    assert given == {"expandable_segments": "True", "pinned_max_round_threshold_mb": "1"}
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    monkeypatch.setenv(name, "max_split_size_mb:128")
    gpu.configure_allocator()
    set_now = {each: gpu.os.environ.get(each) for each in gpu.ALLOCATOR_SETTINGS}
    assert set_now == {**dict(zip(gpu.ALLOCATOR_SETTINGS, itertools.repeat(None))), name: "max_split_size_mb:128"}


def test_torch_knows_the_allocators_settings():
    """It ignores keys that it does not know, in silence: its library must contain them."""
    library = (Path(torch.__file__).parent / "lib" / "libc10.so").read_bytes()
    for key in ("pinned_max_round_threshold_mb", "expandable_segments"):
        assert key.encode() in library, key
