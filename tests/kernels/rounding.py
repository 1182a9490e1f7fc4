"""Triton's interpreter made to round as cards do: to the nearest number, where by itself it cuts bf16's last bits off.

To fp8 it rounds by itself, but halves what rounding brings up to a power of two.
"""

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter

NARROW = {  # (torch's type, the largest number, beyond which cards stay)
    tl.bfloat16: (torch.bfloat16, None),
    tl.float8e4nv: (torch.float8_e4m3fn, 448.0),
}


def round_as_cards_do():
    """Let fp32 numbers become bf16 and e4m3 as torch makes them, in this process."""
    convert = interpreter._convert_float

    def rounded(data, source, target, rounding_mode):
        if source != tl.float32 or target not in NARROW:
            return convert(data, source, target, rounding_mode)
        dtype, largest = NARROW[target]
        wide = torch.from_numpy(np.ascontiguousarray(data).view(np.float32))
        wide = wide if largest is None else wide.clamp(-largest, largest)
        return wide.to(dtype).view(getattr(torch, f"uint{8 * dtype.itemsize}")).numpy().reshape(np.shape(data))

    interpreter._convert_float = rounded
