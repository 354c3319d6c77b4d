"""Arithmetic on plain lists of tensors: the average, the exchange, storage formats, noise, scratch.

Nothing here knows an optimizer, a param group or a slot. Start with ``average``; a new storage
format goes beside ``formats``. Functions expect to run under ``torch.no_grad()``.
"""
