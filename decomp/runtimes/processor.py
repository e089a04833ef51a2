"""What the processor of this machine does with int8."""

import platform
from functools import cache
from typing import Any

import torch


@cache
def int8_sums_saturate() -> bool:
    """Whether this processor adds products of 8 by 8 bits in 16 bits, which saturate.

    x86 processors without VNNI do: their instruction multiplies up to 255 by 127 and adds two such products in a
    signed number of 16 bits. Weights of 7 bits keep every such sum below its end.
    """
    ask: Any = getattr(torch.cpu, "get_capabilities", None)  # torch before 2.11 does not have it
    has = ask() if ask else {"avx512_vnni": torch.cpu._is_vnni_supported()}
    multiplies = any(has.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))
    return platform.machine().lower() in ("x86_64", "amd64") and not multiplies
