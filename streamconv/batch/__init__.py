"""Whole runs: find the checkpoints, convert what is ready and not done, keep to one budget.

One round goes: :mod:`discover` → :mod:`selection` → :mod:`ready` → :mod:`runner` → :mod:`retention`;
:mod:`cycle` strings them together, :mod:`state` remembers. Nothing here loads torch.
"""
