"""The models, as parameter shapes: an update sees tensors, never a forward pass.

Kept in a flat ``ParameterList``, which is the cheapest module there is to walk. Peers that walk the
module at every update are therefore better off here than with a real model.
"""

import torch
from torch import nn


def small():
    return [(1024,)] * 2000


def resnet50():
    shapes, width = [(64, 3, 7, 7), (64,), (64,)], 64
    for planes, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += _bottleneck(width, planes, project=block == 0)
            width = 4 * planes
    return [*shapes, (1000, width), (1000,)]


def gpt2(width=768, layers=12):
    block = [(width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,)]
    block += [(width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(50257, width), (1024, width), *block * layers, (width,), (width,)]


def huge():
    return [(5000, 5000)] * 8


MODELS = {"small": small, "resnet50": resnet50, "gpt2": gpt2, "huge": huge}


def _bottleneck(width, planes, project):
    convs = [(planes, width, 1, 1), (planes, planes, 3, 3), (4 * planes, planes, 1, 1)]
    if project:
        convs.append((4 * planes, width, 1, 1))
    return [shape for conv in convs for shape in (conv, conv[:1], conv[:1])]


def shapes_of(name, quick=False):
    shapes = MODELS[name]()
    return [(min(shape[0], 256), *shape[1:]) for shape in shapes[:10]] if quick else shapes


def make_model(shapes, device, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    weights = (torch.randn(shape, generator=generator) * 0.02 for shape in shapes)
    return nn.ParameterList(nn.Parameter(w.to(device=device, dtype=dtype)) for w in weights)


def describe(name, quick=False):
    shapes = shapes_of(name, quick)
    elements = sum(torch.Size(shape).numel() for shape in shapes)
    return f"{name}: {len(shapes):,} tensors, {elements / 1e6:.1f}M parameters"
