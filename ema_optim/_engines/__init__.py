"""What the package knows of others: DTensor and FSDP2, quantized weights, LoRA adapters.

Each module knows one of them, imports none of them before it is in use, and asks about tensors and
modules only. Start with ``sharding``; a new engine is a new module here.
"""
