"""Which capture of a CUDA graph the current stream is part of, asked of the CUDA driver.

The driver numbers captures, and a number is unique over the lifetime of the process, whoever began the capture. The
function is called by the name that has had this signature since CUDA 11.3; newer drivers keep it beside its successors.
"""

import ctypes
import functools
import logging

import torch

log = logging.getLogger(__name__)

UNTOLD = -1  # a capture that cannot be told from others
_ACTIVE = 1  # CU_STREAM_CAPTURE_STATUS_ACTIVE


def current_capture() -> int | None:
    """The driver's number of the capture; None where there is none; UNTOLD, with a warning, where it cannot be told."""
    if not torch.cuda.is_current_stream_capturing():
        return None
    query = _query()
    if query is None:
        return UNTOLD
    status, number = ctypes.c_int(), ctypes.c_uint64()
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    error = query(stream, ctypes.byref(status), ctypes.byref(number), None, None, None)
    if error or status.value != _ACTIVE:
        _warn(f"cuStreamGetCaptureInfo_v2 returned {error}, status {status.value}")
        return UNTOLD
    return number.value


@functools.cache
def _query():
    try:
        query = ctypes.CDLL("libcuda.so.1").cuStreamGetCaptureInfo_v2
    except (OSError, AttributeError) as problem:
        _warn(str(problem))
        return None
    query.argtypes, query.restype = [ctypes.c_void_p] * 6, ctypes.c_int
    return query


@functools.cache
def _warn(problem: str) -> None:
    log.warning("captures of CUDA graphs cannot be told apart (%s): the proof adds once a layer", problem)
