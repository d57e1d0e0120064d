"""Tensors that say they lie on a CUDA device while their memory is the CPU's: for what is refused before it is read."""

from __future__ import annotations

import ctypes
from unittest import mock

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

_DLPACK_CUDA = 2


def claimed_cuda(tensor: Tensor, index: int = 0) -> Tensor:
    """`tensor` as torch sees one of cuda:<index>; no torch with CUDA and no device is needed.

    A DLPack capsule begins with the data's address (8 bytes), then the device's type and index (4 bytes each).
    """
    capsule = to_dlpack(tensor)
    address = ctypes.pythonapi.PyCapsule_GetPointer
    address.restype, address.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    device = (ctypes.c_int32 * 2).from_address(address(capsule, b"dltensor") + 8)
    device[0], device[1] = _DLPACK_CUDA, index
    with mock.patch.object(torch.cuda, "_lazy_init", return_value=None):
        claimed = torch._C._from_dlpack(capsule)
    assert claimed.device == torch.device("cuda", index)
    return claimed
