"""Measure what is best for each batch size on this machine, keep it, use it, see that it wins.

Imports point one way: `table` (what was measured) -> `text` (as a file), `rows` (as the planner's
table), `search` (what to measure) -> `cache`, `measure`, `tuner`. `guard` stands by itself.
"""
