"""The size of a context's buffers, from the only place where llama.cpp says it: its log."""

from __future__ import annotations

from osync.engine import llama

INFO = 2


def test_the_buffers_of_a_context_are_added_up():
    llama._errors.compute_bytes = 0
    for line in (
        b"load_tensors:   CPU_Mapped model buffer size =    92.10 MiB\n",
        b"llama_context:        CPU  output buffer size =     0.75 MiB\n",
        b"llama_kv_cache:        CPU KV buffer size =   180.00 MiB\n",
        b"sched_reserve:        CPU compute buffer size =    21.50 MiB\n",
        b"sched_reserve:      CUDA0 compute buffer size =   100.00 MiB\n",
        b"sched_reserve: compute buffer size = lie MiB\n",
    ):
        llama._forward_log(INFO, line, None)
    assert llama._errors.compute_bytes == int((0.75 + 21.5 + 100) * (1 << 20))
