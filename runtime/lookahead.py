"""Every class takes its turn: what that means for the synthetic images, without a network pass for each class.

An outer iteration makes one optimiser step on the whole set for each class, with a gradient in the images of that class alone.
The images of a class are moved by their momentum in the turns of the others. That does not depend on any network: so the images
of all classes can be brought to where their turns find them, their gradients taken in one pass, and the turns be made.
Source: SPEC 1.1; the result is that of turn after turn, up to the rounding of a larger batch.
"""
import torch


def lookahead_images(images, optimizer, num_classes):
    """The images of each class as their turn finds them. `images` and `optimizer` end as they were.

    images: (C*ipc, ...) class-major, the parameter of `optimizer`. Returns a tensor like images, without a graph.
    """
    kept, state = images.detach().clone(), _copy(optimizer.state_dict())
    found, images.grad = torch.empty_like(kept), torch.zeros_like(kept)
    for rows in _of_each_class(images, num_classes):
        found[rows] = images.detach()[rows]
        optimizer.step()
    images.data.copy_(kept)
    optimizer.load_state_dict(state)
    return found


def step_per_class(images, optimizer, gradient, num_classes):
    """One step of `optimizer` a class, with the gradient of its images alone. gradient: like images."""
    images.grad = torch.zeros_like(gradient)
    for rows in _of_each_class(images, num_classes):
        images.grad[rows] = gradient[rows]
        optimizer.step()
        images.grad[rows] = 0


def _of_each_class(images, num_classes):
    ipc = len(images) // num_classes
    return [slice(c * ipc, (c + 1) * ipc) for c in range(num_classes)]


def _copy(state):
    """A state_dict whose tensors are copies."""
    if isinstance(state, dict):
        return {key: _copy(value) for key, value in state.items()}
    return state.clone() if isinstance(state, torch.Tensor) else state
