"""Adam, as used by all training here, on a CPU and in CUDA graphs."""

import torch


def get_optimizer(generative_model, inference_network, prior_lr_factor, lr=1e-3):
    """Adam for both models; the prior's learning rate is prior_lr_factor times that of the rest"""
    prior = list(generative_model.prior.parameters())
    others = [p for name, p in generative_model.named_parameters() if not name.startswith("prior.")]
    others += inference_network.parameters()
    groups = [{"params": others, "lr": lr}, {"params": prior, "lr": lr * prior_lr_factor}]
    return get_adam(groups, prior[0].device)


def get_adam(groups, device, lr=1e-3):
    """Adam for parameters or groups of them; on a GPU, fused and capturable by CUDA graphs"""
    on_gpu = device.type == "cuda"  # other devices lack these
    return torch.optim.Adam(groups, lr=lr, fused=on_gpu, capturable=on_gpu)


def load_optimizer(optimizer, state):
    """Restores an optimiser's state, which may come from another device"""
    for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
        saved.update(fused=group["fused"], capturable=group["capturable"])
    optimizer.load_state_dict(state)


def update(optimizer, loss):
    """Takes one optimiser step on the loss"""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
