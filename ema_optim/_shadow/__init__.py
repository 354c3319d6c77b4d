"""The shadow set: slots, options of a group, buckets, swap, names, report, the compiled step.

One object, ``ShadowSet``, owns every EMA tensor, the counters and the state of a swap. Start with
``shadow_set``, then ``buckets`` and ``swap``. Nobody outside this room assigns its attributes.
"""
