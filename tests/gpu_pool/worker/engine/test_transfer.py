"""Arrays on a device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gpu_pool.worker.engine.transfer import ToHost, to_device

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.mark.parametrize("device", DEVICES)
def test_arrays_of_several_types_and_shapes(device):
    arrays = [
        np.arange(6).reshape(2, 3),
        np.array([7, 8], dtype=np.int32),
        np.zeros((0,), dtype=np.int64),
        np.arange(10).reshape(5, 2).T,
        np.array([9], dtype=np.int32),
    ]
    tensors = to_device(arrays, torch.device(device))
    assert all(tensor.device.type == device for tensor in tensors)
    for array, tensor in zip(arrays, tensors, strict=True):
        np.testing.assert_array_equal(tensor.cpu().numpy(), array, strict=True)
    kinds = {array.dtype: tensor.untyped_storage().data_ptr() for array, tensor in zip(arrays, tensors, strict=True)}
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(kinds)  # one copy for each type


def test_nothing():
    assert to_device([], torch.device("cpu")) == []


@pytest.mark.parametrize("device", DEVICES)
def test_back_to_the_host(device):
    values, flags = torch.tensor([0.1, -2.0], dtype=torch.float64, device=device), torch.tensor([True], device=device)
    assert ToHost(values, flags).lists() == [[0.1, -2.0], [True]]
