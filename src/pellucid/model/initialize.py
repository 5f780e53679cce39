"""Starting weights for training. The release brings none (its initial value of everything is zero), so ours:

- matrices: normal, std 1/sqrt(fan_in), so that unit-RMS inputs give unit-RMS outputs (LeCun et al. 1998; Glorot &
  Bengio 2010). Every matrix of a layer reads a normalised input.
- norms: 1, except the two post-norms of each layer: 1/sqrt(2L), so that the 2L branches together add variance 1
  whatever the depth (depth-scaled sandwich norm, Yin et al. 2025, Pangu Ultra).
- embedding: std 0.25/sqrt(D). The multiplier sqrt(D) makes that RMS 0.25 in the residual stream at every width, and
  the tied head starts with scores of about 0.14: the first loss is ln V within 2 %.
- router: std 0.1/sqrt(D), a tenth of the usual, which starts the choice near uniform (Fedus et al. 2021, section 2.4).
- head of a model that labels documents: the same, so that the first loss is ln K (or the variance of the numbers).
"""

from __future__ import annotations

import math

import torch

from pellucid.model.grok import Grok1


@torch.no_grad()
def initialize(model: Grok1, seed: int = 0) -> Grok1:
    """Fill every parameter in place from one CPU generator, so that a seed means the same model on every device."""
    generator = torch.Generator().manual_seed(seed)
    hidden = model.config.hidden_size
    branch = 1.0 / math.sqrt(2 * model.config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.fill_(branch if ".post_" in name else 1.0)
            continue
        if name == "embedding.weight":
            std = 0.25 / math.sqrt(hidden)
        elif name.endswith("router.weight") or name == "score.weight":
            std = 0.1 / math.sqrt(hidden)
        else:
            std = 1.0 / math.sqrt(parameter.shape[-1])
        for block in parameter.view(-1, parameter.shape[-1]).split(65536):  # bounded memory for the largest tensors
            block.copy_(torch.empty(block.shape, dtype=torch.float32).normal_(0.0, std, generator=generator))
    return model
