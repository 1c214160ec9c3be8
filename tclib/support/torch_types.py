"""Devices and types of tensors, as arguments of functions that are `checked`."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import PlainValidator
from pydantic_core import PydanticCustomError

__all__ = ["Device", "FloatType"]


def _device(value: Any) -> torch.device:
    try:
        if value is None:
            raise TypeError  # torch's default, which is not what None stands for
        return torch.empty(0, device=value).device
    except (RuntimeError, AssertionError, TypeError):
        raise PydanticCustomError("device", "expected a device that is here, like cpu") from None


def _float_type(value: Any) -> torch.dtype:
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise PydanticCustomError("dtype", "expected floating point, like torch.float32")
    return value


Device = Annotated[torch.device | str, PlainValidator(_device)]
FloatType = Annotated[torch.dtype, PlainValidator(_float_type)]
