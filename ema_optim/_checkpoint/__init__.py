"""What a file holds: the layout of a checkpoint, the live state view, reading with all checks.

Start with the picture at the head of ``layout``. Keys are for ever: files of older versions have
them. ``read`` checks everything before anything changes.
"""
