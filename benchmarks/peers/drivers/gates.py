"""Training of routers over frozen experts, as mergoo's notebooks and `mixturekit train` do; imported by drivers."""

import torch


def train_gates(model, blocks, *, steps, rows, rate):
    """AdamW on the package's own loss; the rate falls linearly. `blocks`: token ids (N, S)."""
    for name, weight in model.named_parameters():
        weight.requires_grad_(name.endswith("gate.weight"))
    moving = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(moving, rate, weight_decay=0.0)
    order = torch.randperm(len(blocks)).repeat(1 + steps * rows // len(blocks))
    for step in range(steps):
        batch = blocks[order[step * rows : (step + 1) * rows]]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(moving, 1.0)
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
