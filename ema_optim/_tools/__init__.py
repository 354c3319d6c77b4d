"""From files to weights, facts and curves: what ``python -m ema_optim`` does.

Start with ``sources``: it opens every kind of file as one tree of plain values and ``Part``s, from
which ``entries`` picks the EMA. Nothing is unpickled that could run code.
"""
