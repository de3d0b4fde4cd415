"""Adam as all training here uses it, on a CPU and in CUDA graphs."""

import torch


def get_optimizer(generative_model, inference_network, prior_lr_factor, lr=1e-3):
    """Adam for both models, the prior's parameters at prior_lr_factor times the others' rate"""
    prior = list(generative_model.prior.parameters())
    others = [p for name, p in generative_model.named_parameters() if not name.startswith("prior.")]
    others += inference_network.parameters()
    groups = [{"params": others, "lr": lr}, {"params": prior, "lr": lr * prior_lr_factor}]
    return get_adam(groups, prior[0].device)


def get_adam(groups, device, lr=1e-3):
    """Adam for parameters or groups of them; on a GPU, the kind that a CUDA graph can record"""
    on_gpu = device.type == "cuda"  # torch has these for few devices
    return torch.optim.Adam(groups, lr=lr, fused=on_gpu, capturable=on_gpu)


def load_optimizer(optimizer, state):
    """Takes an optimiser's state, which may have been on another device"""
    for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
        saved.update(fused=group["fused"], capturable=group["capturable"])
    optimizer.load_state_dict(state)


def update(optimizer, loss):
    """A step of the optimiser down the gradient of the loss"""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
