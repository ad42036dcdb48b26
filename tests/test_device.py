import os

import pytest
import torch

from runtime.device import get_device, versions
from runtime.safe_io import InputError


def test_deterministic_is_handed_to_pytorch(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        assert get_device("cpu", deterministic=True).type == "cpu"
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_gpu_that_cannot_compute_is_not_chosen(monkeypatch):
    """A driver too old for this PyTorch counts its GPUs, and fails at the first kernel."""
    def ones(*size, **options):
        raise RuntimeError("CUDA error: no kernel image is available for execution\nmore")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert get_device("auto").type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", ones)
    with pytest.warns(UserWarning, match=r"no GPU is used \(CUDA error: no kernel image .*\)$"):
        assert get_device("auto").type == "cpu"


def test_a_missing_device_is_named_and_versions_are_strings():
    with pytest.raises(InputError, match="--device cuda:99 .*choose auto or one of cpu"):
        get_device("cuda:99")
    assert all(type(value) is str for value in versions().values())
