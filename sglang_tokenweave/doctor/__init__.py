"""`python -m sglang_tokenweave.doctor`: whether and how this machine can weave, and what is wrong.

Facts are gathered into frozen dataclasses (`facts`; by `machine`, `software` and, in processes of
their own, `probes`); `hardware`, `system` and `versions` turn facts into findings; `verdict` sums
up. `logs` reads a server's log, `selftest` runs the op. `pains` says which findings tell which of
fifteen known pains.
"""
