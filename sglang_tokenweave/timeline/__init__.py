"""A profile of one step as a picture: what communication was hidden, what was exposed, and where.

Needs neither SGLang nor torch: a profile can be looked at on any machine. docs/timeline.md.
"""
