"""The machine at hand."""
import json
import os

import torch

from runtime.device import get_device, versions


def test_deterministic_is_handed_to_pytorch(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        assert get_device("cpu", deterministic=True).type == "cpu"
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)


def test_versions_are_plain():
    assert json.loads(json.dumps(versions())) == versions()
    assert all(type(value) is str for value in versions().values())
